//! Asks, before anything starts, whether the machine lets the front-end run: the ring, the limits, the ports.
//!
//! glommio finds most of this out later and says it worse: io_uring refused by a container is a panic about an old
//! kernel, locked memory too small an error that is seen when a thread is joined, and a port that another server has
//! is no error at all, because listeners share it.
//!
//! Always true
//! - All checks are made, and each that fails gives one line: what, the value found, the value needed, how to fix it.
//! - What was opened to find out is closed again; no port is ever listened on, so no client can meet a half-open server.
//!
//! Elsewhere: what the configuration itself allows (config/limits.rs). The caller exits with 78.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use socket2::{Domain, Protocol, Socket, Type};

/// Locked memory that glommio 0.9 demands of each of its threads.
pub const MEMLOCK_BYTES_MIN: u64 = 512 * 1024;
/// Oldest kernel whose io_uring does all that glommio 0.9 asks of it.
const KERNEL_MIN: (u32, u32) = (5, 8);
/// Open files of one shard beside its connections: three rings, their event files, listener, wake sockets.
const FDS_PER_SHARD: u64 = 16;
/// Open files of the rest: standard streams, control port and its connections, model files while they load.
const FDS_OTHER: u64 = 128;

/// Longest wait for a connection to a port that is taken, to find out whether anybody listens.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// What the server is about to use.
#[derive(Clone, Debug)]
pub struct PreflightOptions {
    pub listen: SocketAddr,
    pub control: SocketAddr,
    /// Of all shards together.
    pub connections_max: u32,
    pub shards: usize,
}

/// One thing that keeps the server from starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreflightError {
    pub what: &'static str,
    pub found: String,
    pub needed: String,
    pub fix: String,
}

impl fmt::Display for PreflightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, needed {}; {}", self.what, self.found, self.needed, self.fix)
    }
}

impl std::error::Error for PreflightError {}

/// Where the checks get their values from: the machine, or a test.
pub trait Readings {
    /// Opens a ring, makes each of its system calls once, and closes it.
    fn ring(&self) -> io::Result<()>;
    /// `kernel.io_uring_disabled`, where the kernel has it.
    fn io_uring_disabled(&self) -> Option<String>;
    /// Release of the kernel, such as `6.1.0-18`.
    fn kernel(&self) -> String;
    /// Soft and hard limit of locked memory, in bytes.
    fn memlock(&self) -> (u64, u64);
    /// Soft and hard limit of open files.
    fn nofile(&self) -> (u64, u64);
    /// Takes an address alone and gives it back.
    fn bind(&self, addr: SocketAddr) -> io::Result<()>;
}

/// This machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine;

impl Readings for Machine {
    fn ring(&self) -> io::Result<()> {
        let ring = io_uring::IoUring::new(8)?;
        // A profile may allow the first of the three calls and refuse another: glommio would meet it with a panic.
        ring.submitter().register_probe(&mut io_uring::Probe::new())?;
        ring.submit().map(drop)
    }

    fn io_uring_disabled(&self) -> Option<String> {
        let text = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
        Some(text.trim().to_owned())
    }

    fn kernel(&self) -> String {
        std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "unknown".into(), |s| s.trim().into())
    }

    fn memlock(&self) -> (u64, u64) {
        // A limit that cannot be read is not known to be too low.
        getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((RLIM_INFINITY, RLIM_INFINITY))
    }

    fn nofile(&self) -> (u64, u64) {
        getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((RLIM_INFINITY, RLIM_INFINITY))
    }

    /// Without SO_REUSEPORT, so that another server on the port is noticed although both would share it; without
    /// listening. Connections that a server left behind when it ended hold the port against that for a minute, because
    /// glommio's listeners do not set SO_REUSEADDR: they are told from a server by asking for a connection.
    fn bind(&self, addr: SocketAddr) -> io::Result<()> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&addr.into()).or_else(|error| {
            let nobody_listens = error.kind() == io::ErrorKind::AddrInUse
                && TcpStream::connect_timeout(&addr, PROBE_TIMEOUT)
                    .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if nobody_listens { Ok(()) } else { Err(error) }
        })
    }
}

/// Makes every check on this machine.
pub fn run(options: &PreflightOptions) -> Result<(), Vec<PreflightError>> {
    run_with(options, &Machine)
}

/// Makes every check on given readings.
pub fn run_with(options: &PreflightOptions, readings: &dyn Readings) -> Result<(), Vec<PreflightError>> {
    let mut errors = Vec::new();
    errors.extend(check_ring(readings));
    errors.extend(check_memlock(readings));
    errors.extend(check_nofile(options, readings));
    errors.extend(check_port("data port", "listen", options.listen, readings));
    errors.extend(check_port("control port", "control", options.control, readings));
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn check_ring(readings: &dyn Readings) -> Option<PreflightError> {
    let kernel = readings.kernel();
    let needed = format!("io_uring of Linux {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1);
    let error = |found: String, fix: &str| {
        Some(PreflightError { what: "io_uring", found, needed: needed.clone(), fix: fix.into() })
    };
    let old = version_of(&kernel).is_some_and(|version| version < KERNEL_MIN);
    match readings.ring() {
        Ok(()) if old => error(format!("kernel {kernel} is too old"), "run a newer kernel"),
        Ok(()) => None,
        Err(failure) => match failure.raw_os_error() {
            Some(nix::libc::EPERM | nix::libc::EACCES) => match readings.io_uring_disabled().as_deref() {
                Some(value) if value != "0" => error(
                    format!("refused by the kernel setting kernel.io_uring_disabled = {value}"),
                    "set it to 0 with: sysctl kernel.io_uring_disabled=0",
                ),
                value => error(
                    format!(
                        "refused by a security profile (EPERM; kernel.io_uring_disabled = {})",
                        value.unwrap_or("not known to this kernel")
                    ),
                    "run with a seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register",
                ),
            },
            Some(nix::libc::ENOSYS) if old => {
                error(format!("kernel {kernel} is too old (ENOSYS)"), "run a newer kernel")
            }
            Some(nix::libc::ENOSYS) => error(
                format!("kernel {kernel} was built without it, or a security profile hides it (ENOSYS)"),
                "run with a seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register",
            ),
            Some(nix::libc::ENOMEM) => error(
                "no locked memory is left for a ring (ENOMEM)".into(),
                "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=) or end other users of it",
            ),
            _ => error(format!("opening a ring failed: {failure}"), "see the system's log"),
        },
    }
}

fn check_memlock(readings: &dyn Readings) -> Option<PreflightError> {
    let (soft, hard) = readings.memlock();
    if soft >= MEMLOCK_BYTES_MIN {
        return None;
    }
    let kib = MEMLOCK_BYTES_MIN / 1024;
    Some(PreflightError {
        what: "locked memory (RLIMIT_MEMLOCK)",
        found: format!("{} (hard limit {})", limit_text(soft), limit_text(hard)),
        needed: format!("{MEMLOCK_BYTES_MIN} bytes"),
        fix: if hard >= MEMLOCK_BYTES_MIN {
            format!("raise it with: ulimit -l {kib}")
        } else {
            format!(
                "raise the hard limit: LimitMEMLOCK={kib}K in a unit, --ulimit memlock={MEMLOCK_BYTES_MIN} in a container"
            )
        },
    })
}

/// Open files needed for a configuration.
pub fn files_needed(connections_max: u32, shards: usize) -> u64 {
    u64::from(connections_max) + FDS_PER_SHARD * shards as u64 + FDS_OTHER
}

fn check_nofile(options: &PreflightOptions, readings: &dyn Readings) -> Option<PreflightError> {
    let (soft, hard) = readings.nofile();
    let needed = files_needed(options.connections_max, options.shards);
    if soft >= needed {
        return None;
    }
    let raise = if hard >= needed {
        format!("raise it with: ulimit -n {needed}")
    } else {
        format!("raise the hard limit: LimitNOFILE={needed} in a unit, --ulimit nofile={needed} in a container")
    };
    let rest = files_needed(0, options.shards);
    let lower = match soft.saturating_sub(rest) {
        0 => String::new(),
        connections => format!(", or set frontend.connections_max to at most {connections}"),
    };
    Some(PreflightError {
        what: "open files (RLIMIT_NOFILE)",
        found: format!("{} (hard limit {})", limit_text(soft), limit_text(hard)),
        needed: format!("{needed} for {} connections and {} shard(s)", options.connections_max, options.shards),
        fix: raise + &lower,
    })
}

fn check_port(what: &'static str, key: &str, addr: SocketAddr, readings: &dyn Readings) -> Option<PreflightError> {
    let failure = readings.bind(addr).err()?;
    let (found, fix) = match failure.kind() {
        io::ErrorKind::AddrInUse => (
            format!("{addr} is taken by another server"),
            format!("end that server, or choose another port with {key} (0 picks a free one)"),
        ),
        io::ErrorKind::PermissionDenied => (
            format!("{addr} is not allowed to this user"),
            format!("choose a port from 1024 up with {key}, or grant CAP_NET_BIND_SERVICE"),
        ),
        io::ErrorKind::AddrNotAvailable => {
            (format!("{addr} is no address of this machine"), format!("set {key} to one that it has"))
        }
        _ => (format!("{addr} cannot be taken: {failure}"), format!("choose another address with {key}")),
    };
    Some(PreflightError { what, found, needed: "an address this server can have alone".into(), fix })
}

fn limit_text(limit: u64) -> String {
    if limit == RLIM_INFINITY { "unlimited".into() } else { limit.to_string() }
}

/// Major and minor of a release; None where it does not start with them.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    /// A machine on which everything is fine, unless a test says otherwise.
    #[derive(Clone)]
    struct Planted {
        ring: Option<i32>,
        disabled: Option<&'static str>,
        kernel: &'static str,
        memlock: (u64, u64),
        nofile: (u64, u64),
        bind: Option<(u16, io::ErrorKind)>,
    }

    const FINE: Planted = Planted {
        ring: None,
        disabled: Some("0"),
        kernel: "6.1.0-18-amd64",
        memlock: (8 << 20, RLIM_INFINITY),
        nofile: (20_000, 20_000),
        bind: None,
    };

    impl Readings for Planted {
        fn ring(&self) -> io::Result<()> {
            self.ring.map_or(Ok(()), |number| Err(io::Error::from_raw_os_error(number)))
        }

        fn io_uring_disabled(&self) -> Option<String> {
            self.disabled.map(str::to_owned)
        }

        fn kernel(&self) -> String {
            self.kernel.into()
        }

        fn memlock(&self) -> (u64, u64) {
            self.memlock
        }

        fn nofile(&self) -> (u64, u64) {
            self.nofile
        }

        fn bind(&self, addr: SocketAddr) -> io::Result<()> {
            match self.bind {
                Some((port, kind)) if addr.port() == port => Err(kind.into()),
                _ => Ok(()),
            }
        }
    }

    fn options() -> PreflightOptions {
        PreflightOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7600)),
            control: SocketAddr::from((Ipv4Addr::LOCALHOST, 7601)),
            connections_max: 10_000,
            shards: 2,
        }
    }

    /// The one line that these readings give.
    fn line(readings: Planted) -> String {
        let errors = run_with(&options(), &readings).expect_err("a fault was planted");
        assert_eq!(errors.len(), 1, "{errors:?}");
        let line = errors[0].to_string();
        assert!(!line.contains('\n') && line.contains("needed"), "{line}");
        line
    }

    #[test]
    fn a_machine_that_is_fine_passes() {
        assert_eq!(run_with(&options(), &FINE), Ok(()));
    }

    #[test]
    fn io_uring_turned_off_by_the_kernel_names_the_setting_and_its_value() {
        let line = line(Planted { ring: Some(nix::libc::EPERM), disabled: Some("2"), ..FINE });
        assert!(line.contains("kernel.io_uring_disabled = 2") && line.contains("sysctl"), "{line}");
    }

    #[test]
    fn io_uring_refused_by_a_container_names_seccomp_and_the_three_calls() {
        let line = line(Planted { ring: Some(nix::libc::EPERM), ..FINE });
        assert!(line.contains("kernel.io_uring_disabled = 0") && line.contains("seccomp"), "{line}");
        assert!(line.contains("io_uring_setup, io_uring_enter and io_uring_register"), "{line}");
    }

    #[test]
    fn an_old_kernel_is_named_with_its_release() {
        let without = line(Planted { ring: Some(nix::libc::ENOSYS), disabled: None, kernel: "4.19.0-6", ..FINE });
        assert!(without.contains("4.19.0-6 is too old"), "{without}");
        let too_little = line(Planted { kernel: "5.4.0-100-generic", ..FINE });
        assert!(too_little.contains("5.4.0-100-generic is too old") && too_little.contains("5.8"), "{too_little}");
    }

    #[test]
    fn a_profile_that_hides_io_uring_on_a_new_kernel_is_not_called_an_old_kernel() {
        let line = line(Planted { ring: Some(nix::libc::ENOSYS), ..FINE });
        assert!(line.contains("seccomp") && !line.contains("too old"), "{line}");
    }

    #[test]
    fn locked_memory_is_checked_at_its_exact_bound() {
        let with = |soft| Planted { memlock: (soft, soft), ..FINE };
        assert_eq!(run_with(&options(), &with(MEMLOCK_BYTES_MIN)), Ok(()));
        let line = line(with(MEMLOCK_BYTES_MIN - 1));
        assert!(line.contains("524287 (hard limit 524287), needed 524288 bytes"), "{line}");
    }

    #[test]
    fn open_files_are_checked_at_their_exact_bound() {
        let needed = files_needed(10_000, 2);
        let with = |soft| Planted { nofile: (soft, RLIM_INFINITY), ..FINE };
        assert_eq!(run_with(&options(), &with(needed)), Ok(()));
        let line = line(with(needed - 1));
        assert!(line.contains(&format!("{} (hard limit unlimited)", needed - 1)), "{line}");
        assert!(line.contains(&format!("ulimit -n {needed}")), "{line}");
        assert!(line.contains("frontend.connections_max to at most 9999"), "{line}");
    }

    #[test]
    fn each_port_is_checked_and_named_by_its_key() {
        let taken = line(Planted { bind: Some((7600, io::ErrorKind::AddrInUse)), ..FINE });
        assert!(taken.contains("127.0.0.1:7600 is taken") && taken.contains("listen"), "{taken}");
        let denied = line(Planted { bind: Some((7601, io::ErrorKind::PermissionDenied)), ..FINE });
        assert!(denied.starts_with("control port") && denied.contains("CAP_NET_BIND_SERVICE"), "{denied}");
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let readings = Planted { ring: Some(nix::libc::EPERM), memlock: (65_536, 65_536), nofile: (256, 256), ..FINE };
        assert_eq!(run_with(&options(), &readings).expect_err("three faults were planted").len(), 3);
    }

    #[test]
    fn a_server_that_shares_its_port_is_noticed_all_the_same() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
        socket.set_reuse_port(true).expect("Linux has SO_REUSEPORT");
        socket.set_reuse_address(true).expect("and SO_REUSEADDR");
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a free port");
        socket.listen(1).expect("it can listen");
        let other = TcpListener::from(socket);
        let listen = other.local_addr().expect("it is bound");
        assert_eq!(Machine.bind(listen).expect_err("it is taken").kind(), io::ErrorKind::AddrInUse);
        drop(other);
        Machine.bind(listen).expect("it is free again");
    }

    #[test]
    fn connections_that_an_ended_server_left_behind_do_not_take_its_port() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
        socket.set_reuse_port(true).expect("Linux has SO_REUSEPORT"); // and no SO_REUSEADDR, as glommio
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a free port");
        socket.listen(1).expect("it can listen");
        let server = TcpListener::from(socket);
        let listen = server.local_addr().expect("it is bound");
        let client = TcpStream::connect(listen).expect("it listens");
        // Who closes first keeps the connection in TIME_WAIT.
        drop(server.accept().expect("the client is there"));
        drop(client);
        drop(server);
        Machine.bind(listen).expect("nobody listens");
    }

    #[test]
    fn this_machine_can_be_read() {
        assert!(version_of(&Machine.kernel()).is_some(), "{}", Machine.kernel());
        assert!(Machine.nofile().0 > 0);
        assert!(Machine.memlock().0 > 0);
        // Whether the machine that runs the tests has io_uring is its own matter: that the answer is an answer is not.
        if let Some(error) = check_ring(&Machine) {
            assert!(!error.fix.is_empty(), "{error}");
        }
    }
}
