//! The real binary in a process of its own.

#![allow(dead_code)] // each test file uses its own part

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::{Raw, get, metric, models_directory, settings, wait_until};

/// The binary under test: that of this build, or the one that FERRY_BIN names.
pub fn ferry() -> PathBuf {
    std::env::var_os("FERRY_BIN").map_or_else(|| env!("CARGO_BIN_EXE_ferry").into(), PathBuf::from)
}

/// The arguments of `ferry serve` with these settings.
fn arguments(models: &Path, sets: &[&str]) -> Vec<String> {
    let sets = settings(models, sets).into_iter().flat_map(|set| ["--set".to_owned(), set]);
    std::iter::once("serve".to_owned()).chain(sets).collect()
}

/// Runs a server that is expected not to start, behind a shell that sets limits first.
pub fn run_under(limit: &str, models: &Path, sets: &[&str]) -> Output {
    Command::new("sh")
        .arg("-c")
        .arg(format!("{limit}; exec \"$0\" \"$@\""))
        .arg(ferry())
        .args(arguments(models, sets))
        .output()
        .expect("a shell runs")
}

/// A seccomp profile in which a system call fails: always, or where its argument `at` is `min` or more.
pub struct Denied {
    pub call: i64,
    pub from: Option<(u8, u64)>,
    pub error: Errno,
}

impl Denied {
    pub fn always(call: i64, error: Errno) -> Denied {
        Denied { call, from: None, error }
    }

    /// Does `work` on a thread under the profile, which stays on it for good; what it starts inherits it.
    fn around<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let rules = self.from.map(|(at, min)| {
            let condition = SeccompCondition::new(at, SeccompCmpArgLen::Dword, SeccompCmpOp::Ge, min);
            SeccompRule::new(vec![condition.expect("an argument")]).expect("one condition")
        });
        let filter = SeccompFilter::new(
            BTreeMap::from([(self.call, rules.into_iter().collect())]),
            SeccompAction::Allow,
            SeccompAction::Errno(self.error as u32),
            std::env::consts::ARCH.try_into().expect("seccomp knows this processor"),
        );
        let program: BpfProgram = filter.and_then(TryInto::try_into).expect("a filter of one call");
        let under = move || {
            seccompiler::apply_filter(&program).expect("a filter for this thread alone needs no privilege");
            work()
        };
        std::thread::spawn(under).join().expect("it does not panic")
    }
}

/// Runs a server that is expected not to start, under a seccomp profile.
pub fn run_denied(denied: &Denied, models: &Path, sets: &[&str]) -> Output {
    let mut command = Command::new(ferry());
    command.args(arguments(models, sets));
    denied.around(move || command.output().expect("the binary runs"))
}

/// A running server. Dropping it kills it.
pub struct Child {
    pub data: SocketAddr,
    pub control: SocketAddr,
    process: std::process::Child,
    log: Option<JoinHandle<String>>,
    /// While it is there nobody reads what the server says on standard error.
    unread: Option<Sender<()>>,
    models: tempfile::TempDir,
}

impl Child {
    /// Returns when the server says that it is ready.
    pub fn start(sets: &[&str]) -> Child {
        Child::start_in(models_directory(), sets)
    }

    pub fn start_in(models: tempfile::TempDir, sets: &[&str]) -> Child {
        Child::start_by(models, sets, |mut command| command.spawn().expect("the binary runs"))
    }

    /// The same under a seccomp profile.
    pub fn start_denied(denied: &Denied, sets: &[&str]) -> Child {
        Child::start_by(models_directory(), sets, |mut command| {
            denied.around(move || command.spawn().expect("the binary runs"))
        })
    }

    /// The same, and nobody reads its standard error until told to.
    pub fn start_unread(sets: &[&str]) -> Child {
        let (unread, may_read) = channel();
        let spawn = |mut command: Command| command.spawn().expect("the binary runs");
        let mut child = Child::start_gated(models_directory(), sets, spawn, may_read);
        child.unread = Some(unread);
        child
    }

    /// The same with a standard error that is a file, so that there is no log to ask for.
    pub fn start_with_stderr(file: File, sets: &[&str]) -> Child {
        Child::start_by(models_directory(), sets, |mut command| command.stderr(file).spawn().expect("the binary runs"))
    }

    fn start_by(models: tempfile::TempDir, sets: &[&str], spawn: impl FnOnce(Command) -> std::process::Child) -> Child {
        Child::start_gated(models, sets, spawn, channel().1)
    }

    /// Standard error is read once nobody is left who could say so at the other end of `may_read`.
    fn start_gated(
        models: tempfile::TempDir,
        sets: &[&str],
        spawn: impl FnOnce(Command) -> std::process::Child,
        may_read: Receiver<()>,
    ) -> Child {
        let mut command = Command::new(ferry());
        command.args(arguments(models.path(), sets)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = spawn(command);
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let log = process.stderr.take();
        if line.is_empty() {
            let mut text = String::new();
            let _ = log.map(|mut log| log.read_to_string(&mut text));
            panic!("the server did not become ready: {text}");
        }
        let log = log.map(|mut log| {
            std::thread::spawn(move || {
                let _ = may_read.recv();
                let mut bytes = Vec::new();
                let _ = log.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        });
        let field = |name: &str| {
            let value = line.split_whitespace().find_map(|field| field.strip_prefix(name)).expect("the field is there");
            value.parse().expect("an address")
        };
        Child { data: field("data="), control: field("control="), process, log, unread: None, models }
    }

    pub fn connect(&self) -> Raw {
        Raw::open(self.data)
    }

    /// The models directory that it serves.
    pub fn models(&self) -> &Path {
        self.models.path()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id() as i32)
    }

    pub fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(self.pid(), signal).expect("the process is ours");
    }

    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().expect("the process is ours").is_some()
    }

    /// Waits for the end; the exit status, if it was not a signal.
    pub fn status(&mut self) -> Option<i32> {
        let mut status = None;
        wait_until("the process ends", || {
            status = self.process.try_wait().expect("the process is ours");
            status.is_some()
        });
        status.expect("it ended").code()
    }

    /// From here on its standard error is read.
    pub fn read_on(&mut self) {
        self.unread = None;
    }

    /// What it said on standard error. It must have ended.
    pub fn log(&mut self) -> String {
        self.read_on();
        self.log.take().expect("asked for once").join().expect("reading does not panic")
    }

    pub fn metrics(&self) -> String {
        let mut page = String::new();
        wait_until("the control port answers", || {
            page = get(self.control, "/metrics");
            // It answers so many a second. What is not there would count as 0.
            assert!(page.starts_with("HTTP/1.1 200") || page.starts_with("HTTP/1.1 429"), "no metrics: {page:?}");
            page.starts_with("HTTP/1.1 200")
        });
        page
    }

    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        metric(&self.metrics(), name, labels)
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid())).expect("the process lives")
    }

    fn status_line(&self, key: &str) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("the kernel says it");
        line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
    }

    pub fn threads(&self) -> u64 {
        self.status_line("Threads:")
    }

    pub fn resident_bytes(&self) -> i64 {
        self.status_line("VmRSS:") as i64 * 1024
    }

    /// The most memory that is resident at once is counted anew from here.
    pub fn forget_resident_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid()), "5").expect("the process is ours");
    }

    /// The most memory that was resident at once.
    pub fn resident_peak_bytes(&self) -> i64 {
        self.status_line("VmHWM:") as i64 * 1024
    }

    /// The most addresses that were mapped at once, touched or not.
    pub fn address_space_peak_bytes(&self) -> i64 {
        self.status_line("VmPeak:") as i64 * 1024
    }

    /// Open descriptors.
    pub fn files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the process lives").count()
    }

    /// Processor time used so far, in clock ticks.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = self.proc("stat");
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        let fields: Vec<&str> = fields.split_whitespace().collect();
        fields[11].parse::<u64>().expect("user time") + fields[12].parse::<u64>().expect("system time")
    }

    /// Lowers the limit of open files while it runs.
    pub fn limit_files(&self, files: u64) {
        self.limit("nofile", files);
    }

    /// Lowers the limit of its addresses to what it has mapped and `more` bytes.
    pub fn limit_addresses(&self, more: u64) {
        self.limit("as", self.status_line("VmSize:") * 1024 + more);
    }

    fn limit(&self, what: &str, most: u64) {
        let status = Command::new("prlimit")
            .args(["--pid", &self.pid().to_string(), &format!("--{what}={most}:{most}")])
            .status()
            .expect("prlimit is part of util-linux");
        assert!(status.success());
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.read_on();
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
