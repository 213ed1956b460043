//! What callers saw and what executors were given, one JSON object a line, and whether the two agree.
//!
//! Pure: a history is checked the same way a second after it was written and years later, from files.
//!
//! Always true of a sound history
//! - A call that was made has one end: an answer, an error that says whether a model may have run, or `info`, which says that
//!   nobody knows.
//! - An answer is the one that belongs to its call.
//! - What was refused as never executed is in no executor's log; what was answered is in one.
//! - Nobody-knows happens only while something was broken on purpose: the call overlaps a window.
//!
//! Elsewhere: the same promises in virtual time, with deadlines to the microsecond (tests/sim/history.rs).

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;

use serde::{Deserialize, Serialize};

/// One line. Times are µs since the history began, on one clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Entry {
    /// A call is made. `intended_us`: when it was meant to be, which is what lateness counts from.
    Invoke { id: u64, intended_us: u64, deadline_us: Option<u64>, reference: u64 },
    /// It was answered, with a result of this hash.
    Ok { id: u64, at_us: u64, hash: u64 },
    /// It was answered with a code.
    Fail { id: u64, at_us: u64, code: String, executed: Executed },
    /// It ended, and nobody knows how.
    Info { id: u64, at_us: u64, why: String },
    /// An executor was given it.
    Executed { id: u64 },
    /// Something was broken on purpose: a process killed, a connection cut.
    Window { from_us: u64, to_us: u64, why: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Executed {
    Never,
    Maybe,
    Yes,
}

/// What is promised beyond what always is.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// How often one call may have been executed. `None` where a batch may run again or a pool may call twice.
    pub executions_max: Option<u32>,
    /// How much later than its deadline a call may end. `None` where clocks stop on purpose.
    pub late_us_max: Option<u64>,
    /// Executors' logs are whole, so that an answer without an execution is a lie.
    pub executions_are_known: bool,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules { executions_max: Some(1), late_us_max: None, executions_are_known: true }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Violation {
    Lost { id: u64 },
    EndedTwice { id: u64 },
    InvokedTwice { id: u64 },
    NeverInvoked { id: u64 },
    WrongResult { id: u64 },
    ExecutedThoughRefused { id: u64, code: String },
    AnsweredUnexecuted { id: u64 },
    ExecutedTooOften { id: u64, times: u32 },
    ExecutedUninvoked { id: u64 },
    UnknownOutsideWindow { id: u64, why: String },
    Late { id: u64, by_us: u64 },
    Unreadable { line: usize, why: String },
}

/// What a sound history came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub calls: u64,
    pub ok: u64,
    pub failed: BTreeMap<String, u64>,
    pub unknown: u64,
    pub executed: u64,
    pub windows: u64,
    /// From intention to answer, ascending.
    pub latencies_us: Vec<u64>,
}

#[derive(Default)]
struct Call {
    invoked: Option<(u64, Option<u64>, u64)>,
    ends: Vec<Entry>,
    executions: u32,
}

/// Checks a history whose entries may come in any order, as files of several processes do.
pub fn check(entries: &[Entry], rules: &Rules) -> Result<Summary, BTreeSet<Violation>> {
    let mut calls: BTreeMap<u64, Call> = BTreeMap::new();
    let mut windows = Vec::new();
    let mut wrong = BTreeSet::new();
    for entry in entries {
        match entry {
            Entry::Invoke { id, intended_us, deadline_us, reference } => {
                let call = calls.entry(*id).or_default();
                if call.invoked.replace((*intended_us, *deadline_us, *reference)).is_some() {
                    wrong.insert(Violation::InvokedTwice { id: *id });
                }
            }
            Entry::Ok { id, .. } | Entry::Fail { id, .. } | Entry::Info { id, .. } => {
                calls.entry(*id).or_default().ends.push(entry.clone());
            }
            Entry::Executed { id } => calls.entry(*id).or_default().executions += 1,
            Entry::Window { from_us, to_us, .. } => windows.push((*from_us, *to_us)),
        }
    }
    let mut summary = Summary { windows: windows.len() as u64, ..Summary::default() };
    for (id, call) in &calls {
        check_call(*id, call, rules, &windows, &mut summary, &mut wrong);
    }
    summary.latencies_us.sort_unstable();
    if wrong.is_empty() { Ok(summary) } else { Err(wrong) }
}

fn check_call(
    id: u64,
    call: &Call,
    rules: &Rules,
    windows: &[(u64, u64)],
    summary: &mut Summary,
    wrong: &mut BTreeSet<Violation>,
) {
    let Some((intended_us, deadline_us, reference)) = call.invoked else {
        wrong.insert(match call.ends.is_empty() {
            true => Violation::ExecutedUninvoked { id },
            false => Violation::NeverInvoked { id },
        });
        return;
    };
    summary.calls += 1;
    summary.executed += u64::from(call.executions > 0);
    if rules.executions_max.is_some_and(|most| call.executions > most) {
        wrong.insert(Violation::ExecutedTooOften { id, times: call.executions });
    }
    if call.ends.len() > 1 {
        wrong.insert(Violation::EndedTwice { id });
    }
    let Some(end) = call.ends.first() else {
        wrong.insert(Violation::Lost { id });
        return;
    };
    let at = match end {
        Entry::Ok { at_us, hash, .. } => {
            if *hash != reference {
                wrong.insert(Violation::WrongResult { id });
            }
            if rules.executions_are_known && call.executions == 0 {
                wrong.insert(Violation::AnsweredUnexecuted { id });
            }
            summary.ok += 1;
            summary.latencies_us.push(at_us.saturating_sub(intended_us));
            *at_us
        }
        Entry::Fail { at_us, code, executed, .. } => {
            if *executed == Executed::Never && call.executions > 0 {
                wrong.insert(Violation::ExecutedThoughRefused { id, code: code.clone() });
            }
            *summary.failed.entry(code.clone()).or_default() += 1;
            *at_us
        }
        Entry::Info { at_us, why, .. } => {
            if !windows.iter().any(|(from, to)| *from <= *at_us && intended_us <= *to) {
                wrong.insert(Violation::UnknownOutsideWindow { id, why: why.clone() });
            }
            summary.unknown += 1;
            *at_us
        }
        Entry::Invoke { .. } | Entry::Executed { .. } | Entry::Window { .. } => unreachable!("these are no ends"),
    };
    if let (Some(deadline), Some(most)) = (deadline_us, rules.late_us_max)
        && at > deadline + most
    {
        wrong.insert(Violation::Late { id, by_us: at - deadline });
    }
}

/// Reads lines of JSON.
pub fn read(lines: impl BufRead) -> Result<Vec<Entry>, Violation> {
    let mut entries = Vec::new();
    for (at, line) in lines.lines().enumerate() {
        let unreadable = |why: String| Violation::Unreadable { line: at + 1, why };
        let line = line.map_err(|error| unreadable(error.to_string()))?;
        if !line.trim().is_empty() {
            entries.push(serde_json::from_str(&line).map_err(|error| unreadable(error.to_string()))?);
        }
    }
    Ok(entries)
}

/// Lines of JSON.
pub fn text(entries: &[Entry]) -> String {
    entries.iter().map(|entry| serde_json::to_string(entry).expect("plain data") + "\n").collect()
}

/// What a witness wrote down.
pub fn executed(log: &str) -> Vec<Entry> {
    log.lines().map(|line| Entry::Executed { id: line.parse().expect("a number a line") }).collect()
}

fn sound() -> Vec<Entry> {
    let invoke = |id| Entry::Invoke { id, intended_us: id * 10, deadline_us: Some(id * 10 + 1000), reference: id * 7 };
    vec![
        invoke(1),
        invoke(2),
        invoke(3),
        invoke(4),
        Entry::Executed { id: 1 },
        Entry::Ok { id: 1, at_us: 60, hash: 7 },
        Entry::Fail { id: 2, at_us: 61, code: "overloaded".into(), executed: Executed::Never },
        Entry::Executed { id: 3 },
        Entry::Fail { id: 3, at_us: 62, code: "executor_failed".into(), executed: Executed::Maybe },
        Entry::Window { from_us: 40, to_us: 70, why: "killed".into() },
        Entry::Info { id: 4, at_us: 90, why: "connection lost".into() },
    ]
}

const RULES: Rules = Rules { executions_max: Some(1), late_us_max: Some(100), executions_are_known: true };

/// The violations of the sound history with a change planted.
fn found(plant: impl FnOnce(&mut Vec<Entry>)) -> Vec<Violation> {
    let mut entries = sound();
    plant(&mut entries);
    check(&entries, &RULES).expect_err("it was planted").into_iter().collect()
}

fn end_of(entries: &mut [Entry], wanted: u64) -> &mut Entry {
    let is_end = |entry: &Entry| match entry {
        Entry::Ok { id, .. } | Entry::Fail { id, .. } | Entry::Info { id, .. } => *id == wanted,
        _ => false,
    };
    entries.iter_mut().find(|entry| is_end(entry)).expect("every call of the sound history ends")
}

#[test]
fn a_sound_history_passes_in_any_order_and_through_a_file() {
    let summary = check(&sound(), &RULES).expect("sound");
    assert_eq!((summary.calls, summary.ok, summary.unknown, summary.executed), (4, 1, 1, 2));
    assert_eq!(summary.latencies_us, [50]);
    let mut entries = read(text(&sound()).as_bytes()).expect("lines of our own");
    assert_eq!(entries, sound());
    entries.reverse();
    assert_eq!(check(&entries, &RULES), Ok(summary));
    let broken = read("{\"what\":\"ok\",\"id\":1}\n".as_bytes()).expect_err("at_us is missing");
    assert!(matches!(broken, Violation::Unreadable { line: 1, .. }));
}

#[test]
fn a_lost_call_is_found() {
    assert_eq!(found(|all| drop(all.remove(5))), [Violation::Lost { id: 1 }]);
}

#[test]
fn a_doubled_end_is_found_whatever_the_second_says() {
    let second = [
        Entry::Ok { id: 1, at_us: 63, hash: 7 },
        Entry::Fail { id: 1, at_us: 63, code: "cancelled".into(), executed: Executed::Maybe },
    ];
    for second in second {
        assert_eq!(found(|all| all.push(second)), [Violation::EndedTwice { id: 1 }]);
    }
}

#[test]
fn the_answer_of_another_call_is_found() {
    let wrong = found(|all| *end_of(all, 1) = Entry::Ok { id: 1, at_us: 60, hash: 14 });
    assert_eq!(wrong, [Violation::WrongResult { id: 1 }]);
}

#[test]
fn a_refused_call_in_an_executors_log_is_found() {
    let wrong = found(|all| all.push(Entry::Executed { id: 2 }));
    assert_eq!(wrong, [Violation::ExecutedThoughRefused { id: 2, code: "overloaded".into() }]);
}

#[test]
fn an_answer_that_nobody_computed_is_found() {
    assert_eq!(found(|all| drop(all.remove(4))), [Violation::AnsweredUnexecuted { id: 1 }]);
}

#[test]
fn a_call_that_was_executed_twice_is_found() {
    let wrong = found(|all| all.push(Entry::Executed { id: 1 }));
    assert_eq!(wrong, [Violation::ExecutedTooOften { id: 1, times: 2 }]);
}

#[test]
fn nobody_knows_is_allowed_only_while_something_was_broken() {
    for window in [(0, 39), (91, 99)] {
        let wrong = found(|all| {
            let at = all.iter().position(|entry| matches!(entry, Entry::Window { .. })).expect("there is one");
            all[at] = Entry::Window { from_us: window.0, to_us: window.1, why: "elsewhere".into() };
        });
        assert_eq!(wrong, [Violation::UnknownOutsideWindow { id: 4, why: "connection lost".into() }], "{window:?}");
    }
}

#[test]
fn an_end_behind_the_deadline_is_found() {
    let wrong = found(|all| *end_of(all, 1) = Entry::Ok { id: 1, at_us: 1111, hash: 7 });
    assert_eq!(wrong, [Violation::Late { id: 1, by_us: 101 }]);
}

#[test]
fn ends_and_executions_of_calls_that_nobody_made_are_found() {
    assert_eq!(found(|all| all.push(Entry::Ok { id: 9, at_us: 60, hash: 7 })), [Violation::NeverInvoked { id: 9 }]);
    assert_eq!(found(|all| all.push(Entry::Executed { id: 9 })), [Violation::ExecutedUninvoked { id: 9 }]);
    assert_eq!(found(|all| all.push(all[0].clone())), [Violation::InvokedTwice { id: 1 }]);
}

/// `tools/history-check FILE…` runs this on its files.
#[test]
#[ignore = "needs files: tools/history-check"]
fn a_recorded_history_is_sound() {
    let files = std::env::var("FERRY_HISTORY").expect("FERRY_HISTORY names files, with colons between");
    let mut entries = Vec::new();
    for file in files.split(':').filter(|file| !file.is_empty()) {
        let open = std::fs::File::open(file).unwrap_or_else(|error| panic!("{file}: {error}"));
        let of_file = match file.ends_with(".log") {
            true => executed(&std::io::read_to_string(open).expect("text")),
            false => read(std::io::BufReader::new(open)).unwrap_or_else(|wrong| panic!("{file}: {wrong:?}")),
        };
        entries.extend(of_file);
    }
    let known = entries.iter().any(|entry| matches!(entry, Entry::Executed { .. }));
    let rules = Rules { executions_max: None, executions_are_known: known, ..Rules::default() };
    match check(&entries, &rules) {
        Ok(summary) => println!("sound: {:?}", Summary { latencies_us: Vec::new(), ..summary }),
        Err(wrong) => panic!("{} violations, the first: {:?}", wrong.len(), wrong.iter().take(20).collect::<Vec<_>>()),
    }
}
