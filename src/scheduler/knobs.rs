//! A policy's knobs by name, as text: what a command line, a control port and a what-if replay set and show.
//!
//! Always true
//! - [`Policy::set`] changes nothing when it fails, and leaves no contradiction: every row that a model accepts has a bucket,
//!   and fits a batch alone.
//! - [`Policy::get`] gives text that [`Policy::set`] takes, with the same meaning.
//!
//! Elsewhere: what each knob does to a decision (policy.rs, and the policies), a manifest's spelling of them
//! (models/manifest.rs), changing them while the model serves ([`super::Scheduler::set_policy`]).

use std::time::Duration;

use super::edges::SHAPES_MAX;
use super::policy::{Class, Edges, PadTo, Policy, PolicyKind};
use super::{Buckets, QueueLimits};
use crate::vocab::Layout;

/// A knob, as help text shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knob {
    pub name: &'static str,
    /// Unit of its number; empty where it is a word or a share.
    pub unit: &'static str,
    /// Values that it takes.
    pub range: &'static str,
    pub meaning: &'static str,
}

const fn knob(name: &'static str, unit: &'static str, range: &'static str, meaning: &'static str) -> Knob {
    Knob { name, unit, range, meaning }
}

/// All knobs, the most used first.
pub const KNOBS: &[Knob] = &[
    knob("policy", "", "window, greedy_tokens, buckets or cost", "who decides"),
    knob("rows_max", "rows", "1 to 65536", "most rows in a batch"),
    knob(
        "cells_max",
        "cells",
        "the longest bucket to 2^40",
        "most cells in a batch: rows × padded length, or the sum of their lengths where they lie end to end",
    ),
    knob(
        "queue_delay_max_us",
        "µs",
        "0 to 60000000, or auto",
        "longest time that rows are held for others while an executor is idle; auto: as long as it pays",
    ),
    knob(
        "buckets",
        "cells",
        "ascending lengths such as 16,32,128 that end with the present longest, or geometric, or auto",
        "padded lengths, and the queues of the policy buckets; auto: those that pad least what comes",
    ),
    knob("shapes_max", "buckets", "1 to 64", "most buckets where they are chosen automatically"),
    knob("pad_to", "", "bucket or longest", "what a batch is padded to: its longest row's bucket, or that row"),
    knob(
        "layout",
        "",
        "padded, or packed where the model can",
        "how the rows of a batch lie: each in its place, or end to end",
    ),
    knob("slo_ms", "ms", "0.01 to 600000", "slack of a request without a deadline, and the unit of ageing"),
    knob("weight", "", "0.001 to 1000", "share of the executors, beside other models'"),
    knob("fill_waste_max", "", "0 to below 1", "policy buckets: most padding in a shorter lane that joins a batch"),
    knob("queue_rows_max", "rows", "1 to 2^40, or none", "most rows of this model that wait"),
    knob("queue_cells_max", "cells", "1 to 2^50, or none", "most padded cells of this model that wait"),
    knob("queue_bytes_max", "bytes", "1 to 2^50, or none", "most payload bytes of this model that wait"),
    knob(
        "efficiency_floor",
        "",
        "0 to 1",
        "least efficiency of an urgent batch, as a share of the best one's; 0 lets overload feed itself",
    ),
    knob("base_worth", "", "0 to 1000", "worth of a row that has just come; higher: throughput, lower: tail"),
    knob("overhead_worth", "", "0 to 100", "share of a batch's fixed cost that its rows are worth; higher: short rows"),
    knob("slack_share", "", "0.001 to 1000", "longest batch, as a share of its rows' slack"),
    knob("class_worth", "", "three numbers from 0.001 to 1000, such as 1,0.55,0.3", "worth of a row by class"),
    knob("hold", "", "0 to 1000", "how long holding rows for others pays, in shares of a batch's fixed cost"),
    knob(
        "fair_admission",
        "",
        "0 to 1000",
        "of several tenants, the heaviest is refused beyond this share of its slack; 0: never",
    ),
    knob(
        "overload_admission",
        "",
        "0 to 1000, or auto",
        "share of its slack that a request may wait behind a queue that stands; what would wait longer is refused, \
         end to end down to half of it where most are; 0: never; auto: 0.15 where rows lie end to end, 0.5 where they share one \
         bucket, else 0, as with policies other than cost",
    ),
    knob("age_max", "slacks", "0.01 to 1000000", "a row that has waited so long is in the next batch"),
];

const ROWS_MAX: u32 = 1 << 16;
const CELLS_MAX: u64 = 1 << 40;
const QUEUE_ROWS_MAX: u64 = 1 << 40;
const QUEUE_MAX: u64 = 1 << 50;
const DELAY_MAX_US: f64 = 60e6;

impl Policy {
    /// Sets one knob. The text of an error says what was expected and what came.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        *self = self.with([(key, value)])?;
        Ok(())
    }

    /// The policy with these knobs set. Contradictions are looked for at the end, so that knobs can move together.
    pub fn with<'a>(&self, changes: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Policy, String> {
        let mut changed = self.clone();
        for (key, value) in changes {
            changed.put(key, value.trim(), self)?;
        }
        changed.check()?;
        Ok(changed)
    }

    /// A knob's value as [`Policy::set`] takes it. `None`: there is no such knob.
    pub fn get(&self, key: &str) -> Option<String> {
        let tuning = &self.tuning;
        let bound = |max: u64| if max == u64::MAX { "none".into() } else { max.to_string() };
        Some(match key {
            "policy" => self.kind.name().into(),
            "rows_max" => self.rows_max.to_string(),
            "cells_max" => self.cells_max.to_string(),
            "queue_delay_max_us" => {
                self.queue_delay_max.map_or("auto".into(), |delay| (delay.as_nanos() as f64 / 1e3).to_string())
            }
            "buckets" if self.edges == Edges::Auto => "auto".into(),
            "buckets" if self.buckets == Buckets::geometric(self.buckets.longest()) => "geometric".into(),
            "buckets" => list(self.buckets.lens()),
            "shapes_max" => self.shapes_max.to_string(),
            "pad_to" => match self.pad_to {
                PadTo::Bucket => "bucket".into(),
                PadTo::Longest => "longest".into(),
            },
            "layout" => self.layout.name().into(),
            "slo_ms" => (self.slo.as_nanos() as f64 / 1e6).to_string(),
            "weight" => self.weight.to_string(),
            "fill_waste_max" => self.fill_waste_max.to_string(),
            "queue_rows_max" => bound(self.queue.rows_max),
            "queue_cells_max" => bound(self.queue.cells_max),
            "queue_bytes_max" => bound(self.queue.bytes_max),
            "efficiency_floor" => tuning.efficiency_floor.to_string(),
            "base_worth" => tuning.base_worth.to_string(),
            "overhead_worth" => tuning.overhead_worth.to_string(),
            "slack_share" => tuning.slack_share.to_string(),
            "class_worth" => list(&tuning.class_worth),
            "hold" => tuning.hold.to_string(),
            "fair_admission" => tuning.fair_admission.to_string(),
            "overload_admission" => tuning.overload_admission.map_or("auto".into(), |share| share.to_string()),
            "age_max" => tuning.age_max.to_string(),
            _ => return None,
        })
    }

    /// Sets one knob whose value is good by itself. `before` is the policy that serves.
    fn put(&mut self, key: &str, value: &str, before: &Policy) -> Result<(), String> {
        let knob = KNOBS.iter().find(|knob| knob.name == key).ok_or_else(|| {
            let known: Vec<&str> = KNOBS.iter().map(|knob| knob.name).collect();
            format!("unknown knob `{key}`; known are {}", known.join(", "))
        })?;
        let wrong = || format!("{key}: expected {}, got `{value}`", knob.range);
        let number = |low: f64, high: f64| within(value, low, high).ok_or_else(wrong);
        let count =
            |low: u64, high: u64| value.parse().ok().filter(|count| (low..=high).contains(count)).ok_or_else(wrong);
        let bound = |high: u64| if value == "none" { Ok(u64::MAX) } else { count(1, high) };
        let (queue, tuning) = (&mut self.queue, &mut self.tuning);
        match key {
            "policy" => self.kind = PolicyKind::from_name(value).ok_or_else(wrong)?,
            "rows_max" => self.rows_max = count(1, ROWS_MAX.into())? as u32,
            "cells_max" => self.cells_max = count(1, CELLS_MAX)?,
            "queue_delay_max_us" if value == "auto" => self.queue_delay_max = None,
            "queue_delay_max_us" => {
                self.queue_delay_max = Some(Duration::from_nanos((number(0.0, DELAY_MAX_US)? * 1e3).round() as u64));
            }
            // Which they are is for the scheduler to say, when it takes the policy.
            "buckets" if value == "auto" => self.edges = Edges::Auto,
            "buckets" => {
                self.buckets = buckets(value, before.buckets.longest()).ok_or_else(wrong)?;
                self.edges = Edges::Given;
            }
            "shapes_max" => self.shapes_max = count(1, SHAPES_MAX.into())? as u16,
            "pad_to" => {
                self.pad_to = match value {
                    "bucket" => PadTo::Bucket,
                    "longest" => PadTo::Longest,
                    _ => return Err(wrong()),
                }
            }
            "layout" => {
                self.layout = match value {
                    "padded" => Layout::Padded,
                    "packed" if self.can_pack => Layout::Packed,
                    "packed" => {
                        return Err("layout: expected padded, the only one that this model has; got `packed`".into());
                    }
                    _ => return Err(wrong()),
                }
            }
            "slo_ms" => self.slo = Duration::from_nanos((number(0.01, 600_000.0)? * 1e6).round() as u64),
            "weight" => self.weight = number(0.001, 1000.0)?,
            "fill_waste_max" => self.fill_waste_max = number(0.0, 1.0f64.next_down())?,
            "queue_rows_max" => queue.rows_max = bound(QUEUE_ROWS_MAX)?,
            "queue_cells_max" => queue.cells_max = bound(QUEUE_MAX)?,
            "queue_bytes_max" => queue.bytes_max = bound(QUEUE_MAX)?,
            "efficiency_floor" => tuning.efficiency_floor = number(0.0, 1.0)?,
            "base_worth" => tuning.base_worth = number(0.0, 1000.0)?,
            "overhead_worth" => tuning.overhead_worth = number(0.0, 100.0)?,
            "slack_share" => tuning.slack_share = number(0.001, 1000.0)?,
            "class_worth" => {
                let worths: Option<Vec<f64>> = value.split(',').map(|one| within(one, 0.001, 1000.0)).collect();
                let worths: Option<[f64; Class::COUNT]> = worths.and_then(|worths| worths.try_into().ok());
                tuning.class_worth = worths.ok_or_else(wrong)?;
            }
            "hold" => tuning.hold = number(0.0, 1000.0)?,
            "fair_admission" => tuning.fair_admission = number(0.0, 1000.0)?,
            "overload_admission" if value == "auto" => tuning.overload_admission = None,
            "overload_admission" => tuning.overload_admission = Some(number(0.0, 1000.0)?),
            "age_max" => tuning.age_max = number(0.01, 1e6)?,
            _ => unreachable!("KNOBS lists what is set here"),
        }
        Ok(())
    }

    /// What each knob cannot say of the others.
    fn check(&self) -> Result<(), String> {
        let longest = self.buckets.longest();
        if self.cells_max < u64::from(longest) {
            let cells = self.cells_max;
            return Err(format!(
                "cells_max: expected at least {longest}, the longest bucket, or its rows could never run; got {cells}"
            ));
        }
        let QueueLimits { rows_max, cells_max, .. } = self.queue;
        for (key, bound, batch) in [
            ("queue_rows_max", rows_max, u64::from(self.rows_max)),
            ("queue_cells_max", cells_max, self.cells_max.min(u64::from(self.rows_max) * u64::from(longest))),
        ] {
            if bound < batch {
                return Err(format!("{key}: expected at least {batch}, what one full batch holds; got {bound}"));
            }
        }
        Ok(())
    }
}

fn within(value: &str, low: f64, high: f64) -> Option<f64> {
    value.trim().parse().ok().filter(|number: &f64| *number >= low && *number <= high)
}

/// The longest stays: a row that the model accepts must keep its bucket, and no other is ever that long.
fn buckets(value: &str, longest: u32) -> Option<Buckets> {
    if value == "geometric" {
        return Some(Buckets::geometric(longest));
    }
    let lens: Result<Vec<u32>, _> = value.split(',').map(|len| len.trim().parse()).collect();
    Buckets::new(&lens.ok()?).ok().filter(|buckets| buckets.longest() == longest)
}

fn list<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy::new(8, 512, Buckets::new(&[16, 64, 128]).expect("ascending"))
    }

    /// For each knob: values that it takes, and values that it does not.
    const VALUES: &[(&str, &[&str], &[&str])] = &[
        ("policy", &["window", "greedy_tokens", "buckets", "cost"], &["", "Cost", "fifo"]),
        ("rows_max", &["1", "7", "65536"], &["0", "65537", "-1", "1.5", ""]),
        ("cells_max", &["128", "1000", "1099511627776"], &["0", "127", "1099511627777", "many"]),
        ("queue_delay_max_us", &["0", "1500", "0.5", "60000000", "auto"], &["-1", "60000001", "NaN", "inf", ""]),
        ("buckets", &["128", "1,2,128", "geometric", "auto"], &["", "128,64", "16,64", "16,256", "0,128", "16,,128"]),
        ("shapes_max", &["1", "16", "64"], &["0", "65", "-1", "auto"]),
        ("pad_to", &["bucket", "longest"], &["", "none"]),
        ("layout", &["padded"], &["", "ragged", "packed"]),
        ("slo_ms", &["0.01", "50", "12.5", "600000"], &["0", "0.009", "600001", "NaN"]),
        ("weight", &["0.001", "1", "2.5", "1000"], &["0", "1001", "-1", "NaN"]),
        ("fill_waste_max", &["0", "0.25", "0.999"], &["1", "-0.1", "NaN"]),
        ("queue_rows_max", &["8", "none", "4096"], &["0", "7", "-1", "auto"]),
        ("queue_cells_max", &["512", "none"], &["0", "511"]),
        ("queue_bytes_max", &["1", "none"], &["0", "x"]),
        ("efficiency_floor", &["0", "0.65", "1"], &["1.1", "-0.1", "NaN"]),
        ("base_worth", &["0", "0.3", "1000"], &["-1", "1001"]),
        ("overhead_worth", &["0", "0.5", "100"], &["-1", "101"]),
        ("slack_share", &["0.001", "1", "1000"], &["0", "1001"]),
        ("class_worth", &["1,0.55,0.3", "1, 1, 1"], &["1", "1,2", "1,2,3,4", "0,1,1", "a,b,c"]),
        ("hold", &["0", "1", "1000"], &["-1", "1001"]),
        ("fair_admission", &["0", "0.7", "1000"], &["-1", "NaN"]),
        ("overload_admission", &["0", "0.25", "1000", "auto"], &["-1", "NaN", ""]),
        ("age_max", &["0.01", "10", "1000000"], &["0", "1000001"]),
    ];

    #[test]
    fn every_knob_takes_what_its_range_says_and_shows_it_again() {
        let named: Vec<&str> = VALUES.iter().map(|(key, ..)| *key).collect();
        assert_eq!(named, KNOBS.iter().map(|knob| knob.name).collect::<Vec<_>>());
        for (key, good, bad) in VALUES {
            for value in *good {
                let mut set = policy();
                set.set(key, value).unwrap_or_else(|error| panic!("{error}"));
                let shown = set.get(key).expect("a knob");
                let mut again = policy();
                again.set(key, &shown).unwrap_or_else(|error| panic!("{error}"));
                assert_eq!(set, again, "{key} = {value} is shown as {shown}");
            }
            for value in *bad {
                let mut set = policy();
                let error = set.set(key, value).expect_err(&format!("{key} = {value} was taken"));
                assert!(error.starts_with(key) && error.contains("expected"), "{error}");
                assert_eq!(set, policy(), "{key} = {value} changed something");
            }
        }
    }

    #[test]
    fn each_value_changes_its_own_knob_and_no_other() {
        for (key, good, _) in VALUES {
            for value in *good {
                let mut set = policy();
                set.set(key, value).expect("in range");
                for other in KNOBS.iter().filter(|other| other.name != *key) {
                    assert_eq!(set.get(other.name), policy().get(other.name), "{key} changed {}", other.name);
                }
            }
            let seen: std::collections::BTreeSet<_> = good
                .iter()
                .map(|value| {
                    let mut set = policy();
                    set.set(key, value).expect("in range");
                    set.get(key)
                })
                .collect();
            assert_eq!(seen.len(), good.len(), "two values of {key} are shown alike");
        }
    }

    #[test]
    fn a_policy_shows_itself_completely() {
        let mut before = policy();
        for (key, good, _) in VALUES {
            before.set(key, good[good.len() / 2]).expect("in range");
        }
        let shown: Vec<(&str, String)> =
            KNOBS.iter().map(|knob| (knob.name, before.get(knob.name).expect("a knob"))).collect();
        let after = policy().with(shown.iter().map(|(key, value)| (*key, value.as_str()))).expect("what was shown");
        assert_eq!(before, after);
    }

    #[test]
    fn knobs_that_need_each_other_move_together() {
        let mut apart = policy();
        apart.queue = QueueLimits { rows_max: 8, ..QueueLimits::NONE };
        assert!(apart.set("rows_max", "9").is_err());
        let together = apart.with([("rows_max", "9"), ("queue_rows_max", "9")]).expect("together they fit");
        assert_eq!((together.rows_max, together.queue.rows_max), (9, 9));
    }

    #[test]
    fn an_unknown_knob_is_told_of_the_known_ones() {
        let error = policy().set("row_max", "8").expect_err("unknown");
        assert!(error.contains("row_max") && error.contains("rows_max"), "{error}");
        assert_eq!(policy().get("row_max"), None);
    }

    #[test]
    fn buckets_are_shown_by_the_shortest_name_that_says_them() {
        let mut policy = policy();
        assert_eq!(policy.get("buckets").as_deref(), Some("16,64,128"));
        policy.set("buckets", "geometric").expect("in range");
        assert_eq!(policy.get("buckets").as_deref(), Some("geometric"));
        policy.set("buckets", "auto").expect("in range");
        assert_eq!(policy.get("buckets").as_deref(), Some("auto"));
    }
}
