//! What became of one request, in plain sentences: for people who ask why it took so long.
//!
//! Always true
//! - The parts of [`Times`] add up to its total; `held`, `behind` and `other` to `queue`.
//!
//! Elsewhere: where the numbers come from (mod.rs for a batch's oldest request, a receipt for one's own: commands/explain.rs).

use serde::{Deserialize, Serialize};

use super::{BatchRecord, Outcome};
use crate::vocab::{Layout, Moment, SealReason};

/// Where the time went, in µs, in the order of the stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Read, checked, mailed to the batcher; for text, tokenized.
    pub admit: f64,
    pub queue: f64,
    /// Of the queue: an executor could have run it, and the policy waited for others to join.
    pub held: f64,
    /// Of the queue: every executor that could run it ran something else.
    pub behind: f64,
    /// Of the queue: its model had its share of the executors, or its composition was not complete.
    pub other: f64,
    pub pack: f64,
    /// Packed to started.
    pub wait: f64,
    /// Of the wait: copying to the device.
    pub upload: f64,
    pub run: f64,
    /// Of the run: copying back from the device.
    pub readback: f64,
    /// Finished to written.
    pub scatter: f64,
    pub total: f64,
}

/// What became of one request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Story {
    pub model: String,
    pub batch: u64,
    pub executor: u16,
    pub generation: u32,
    /// Name of a [`SealReason`].
    pub reason: String,
    /// Name of a [`Layout`].
    pub layout: String,
    pub rows: u32,
    pub len: u32,
    pub batch_rows: u32,
    pub rows_possible: u32,
    pub padded_len: u32,
    pub cells_real: u64,
    pub cells_padded: u64,
    pub cells_own_padding: u64,
    /// Other requests in the batch, and how long the rows of the first of them were.
    pub co_members: u32,
    pub co_lens: Vec<u32>,
    /// 0: nothing was known.
    pub predicted_us: f64,
    /// How much later than intended it was sent, where its caller says so; before all other times. 0: not known.
    #[serde(default)]
    pub late_us: f64,
    /// The batch ended without results.
    pub failed: bool,
    pub times_us: Times,
}

impl Story {
    /// Of the oldest request of a batch that ran. `None`: it has not run yet.
    pub fn of(record: &BatchRecord, model: &str) -> Option<Story> {
        let ran = record.ran?;
        let micros = |from: Moment, to: Moment| to.since(from).as_nanos() as f64 / 1e3;
        let oldest = &record.oldest;
        let sealed_at = record.sealed_at.max(oldest.admitted_at);
        let queue = sealed_at.since(oldest.admitted_at).as_nanos() as u64;
        let behind = oldest.waited.behind.min(queue);
        let other = oldest.waited.other.min(queue - behind);
        let own = match record.layout {
            Layout::Padded => u64::from(oldest.rows) * u64::from(record.padded_len.saturating_sub(oldest.len)),
            Layout::Packed => 0,
        };
        let mut co_lens = record.lens().to_vec();
        if (oldest.at as usize) < co_lens.len() {
            co_lens.remove(oldest.at as usize);
        }
        let last_at = record.last_at();
        Some(Story {
            model: model.to_owned(),
            batch: record.id,
            executor: record.executor,
            generation: record.generation,
            reason: record.reason.name().to_owned(),
            layout: record.layout.name().to_owned(),
            rows: oldest.rows,
            len: oldest.len,
            batch_rows: record.rows,
            rows_possible: record.rows_possible,
            padded_len: record.padded_len,
            cells_real: record.cells_real,
            cells_padded: record.cells_padded,
            cells_own_padding: own,
            co_members: record.members - 1,
            co_lens,
            predicted_us: record.predicted as f64 / 1e3,
            late_us: 0.0,
            failed: ran.outcome != Outcome::Ok,
            times_us: Times {
                admit: micros(oldest.received_at, oldest.admitted_at),
                queue: queue as f64 / 1e3,
                held: (queue - behind - other) as f64 / 1e3,
                behind: behind as f64 / 1e3,
                other: other as f64 / 1e3,
                pack: micros(sealed_at, record.packed_at),
                wait: micros(record.packed_at, ran.started_at),
                upload: ran.device.map_or(0.0, |device| micros(device.asked_at, device.uploaded_at)),
                run: micros(ran.started_at, ran.finished_at),
                readback: ran.device.map_or(0.0, |device| micros(device.computed_at, ran.finished_at)),
                scatter: micros(ran.finished_at, last_at),
                total: micros(oldest.received_at, last_at),
            },
        })
    }

    /// The story, sentence by sentence.
    pub fn sentences(&self) -> Vec<String> {
        let t = &self.times_us;
        let mut said = vec![format!(
            "{} was in the server for {}: {} until admitted, {} in the queue, {} packed, {} until it started, {} running, {} \
             until its answer was written.",
            match (self.rows, self.len) {
                (1, len) => format!("A row of length {len} for {}", self.model),
                (rows, len) => format!("{rows} rows of length {len} for {}", self.model),
            },
            time(t.total),
            time(t.admit),
            time(t.queue),
            time(t.pack),
            time(t.wait),
            time(t.run),
            time(t.scatter),
        )];
        if self.late_us > 0.0 {
            let (late, total) = (time(self.late_us), time(self.late_us + t.total));
            said.push(format!("It was sent {late} later than its caller meant to: {total} in all."));
        }
        said.extend(self.queue_sentence());
        said.push(self.batch_sentence());
        said.extend(self.mates_sentence());
        said.push(self.padding_sentence());
        said.push(self.run_sentence());
        said.extend(self.most_sentence());
        said
    }

    fn queue_sentence(&self) -> Option<String> {
        let t = &self.times_us;
        let causes = [
            (t.held, "held for others to join although an executor could have run it"),
            (t.behind, "behind running batches: no executor was free"),
            (
                t.other,
                if self.reason == SealReason::Composed.name() {
                    "until the batch that its caller composed was complete"
                } else {
                    "while its model had its share of the executors"
                },
            ),
        ];
        let told: Vec<String> = causes
            .iter()
            .filter(|(micros, _)| *micros > 0.0)
            .map(|(micros, why)| format!("{} {why}", time(*micros)))
            .collect();
        (!told.is_empty()).then(|| format!("Of the queue: {}.", told.join("; ")))
    }

    fn batch_sentence(&self) -> String {
        let reason = SealReason::ALL.into_iter().find(|reason| reason.name() == self.reason);
        format!(
            "Batch {} of {} row(s), of {} possible, was sealed because {} ({}; policy generation {}).",
            self.batch,
            self.batch_rows,
            self.rows_possible,
            reason.map_or("of a reason that this version does not know", because),
            self.reason,
            self.generation
        )
    }

    fn mates_sentence(&self) -> Option<String> {
        if self.co_members == 0 {
            return Some("Nobody shared the batch.".into());
        }
        let lens: Vec<String> = self.co_lens.iter().map(u32::to_string).collect();
        let more = if (self.co_lens.len() as u32) < self.co_members { ", …" } else { "" };
        let (shortest, longest) = (self.co_lens.iter().min()?, self.co_lens.iter().max()?);
        Some(format!(
            "{} other request(s) shared it, of lengths {shortest} to {longest}: {}{more}.",
            self.co_members,
            lens.join(", ")
        ))
    }

    fn padding_sentence(&self) -> String {
        if self.layout == Layout::Packed.name() {
            return format!("Rows lay end to end: {} cells, no padding.", self.cells_real);
        }
        let padding = self.cells_padded.saturating_sub(self.cells_real);
        format!(
            "Rows were padded to {}: {padding} of {} cells ({:.0} %) were padding, {} of them behind its own row(s).",
            self.padded_len,
            self.cells_padded,
            100.0 * padding as f64 / self.cells_padded.max(1) as f64,
            self.cells_own_padding
        )
    }

    fn run_sentence(&self) -> String {
        let t = &self.times_us;
        let device = match t.upload + t.readback > 0.0 {
            true => format!(", copied there in {} and back in {}", time(t.upload), time(t.readback)),
            false => String::new(),
        };
        let expected = match self.predicted_us > 0.0 {
            true => format!("; {} had been expected", time(self.predicted_us)),
            false => String::new(),
        };
        let failed = if self.failed { ", and failed" } else { "" };
        format!("It ran for {} on executor {}{device}{expected}{failed}.", time(t.run), self.executor)
    }

    /// The largest part, and what it depends on.
    fn most_sentence(&self) -> Option<String> {
        let t = &self.times_us;
        let padding = 1.0 - self.cells_real as f64 / self.cells_padded.max(1) as f64;
        let parts = [
            (t.admit, "being read, checked and handed to the batcher: busy shards or tokenizers"),
            (t.held, "being held: queue_delay_max_us bounds that, and 0 never holds"),
            (t.behind, "waiting for an executor: more executors, or a smaller batch before it, would have been sooner"),
            (t.other, "waiting for its turn among models, or for its composition: weight is a model's share"),
            (t.pack, "packing"),
            (t.wait, "waiting, packed, for its executor: executor.slots binds batches ahead"),
            (
                t.run,
                match padding > 0.3 && self.layout == Layout::Padded.name() {
                    true => {
                        "running, of which a large share was padding: see /v1/models/{model}/lengths for better buckets"
                    }
                    false => "running: fewer rows_max or cells make each batch shorter, and all of them fewer",
                },
            ),
            (t.scatter, "writing the answer: busy shards"),
        ];
        let (micros, what) = parts.into_iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
        (t.total > 0.0).then(|| format!("Most of it, {:.0} %, was {what}.", 100.0 * micros / t.total))
    }
}

/// Why a batch was sealed, after "because".
fn because(reason: SealReason) -> &'static str {
    match reason {
        SealReason::Full => "no further row fitted",
        SealReason::Idle => "an executor was idle and nothing said to hold it",
        SealReason::QueueDelay => "its oldest row had waited as long as promised",
        SealReason::Deadline => "a deadline left no more time to wait",
        SealReason::Drain => "the server was draining",
        SealReason::Composed => "its composition was complete",
        SealReason::Urgent => "a deadline, or a row that had waited long, pressed",
        SealReason::Economic => "the next row was not expected soon enough to pay for the wait",
    }
}

fn time(micros: f64) -> String {
    match micros {
        ..1e3 => format!("{micros:.0} µs"),
        1e3..1e6 => format!("{:.2} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ran, record};
    use super::*;
    use std::time::Duration;

    fn story() -> Story {
        let mut record = record(7, 1000);
        let ran = ran(&record);
        record.ran = Some(ran);
        record.answered_at = Some(ran.finished_at + Duration::from_micros(10));
        Story::of(&record, "minilm").expect("it ran")
    }

    #[test]
    fn the_parts_of_a_story_add_up() {
        let t = story().times_us;
        assert!((t.held + t.behind + t.other - t.queue).abs() < 1e-6, "{t:?}");
        assert!((t.admit + t.queue + t.pack + t.wait + t.run + t.scatter - t.total).abs() < 1e-6, "{t:?}");
        assert_eq!((t.admit, t.held, t.behind, t.total), (20.0, 200.0, 100.0, 845.0));
    }

    #[test]
    fn it_is_told_in_sentences() {
        let told = story().sentences().join("\n");
        for part in [
            "A row of length 5 for minilm was in the server for 845 µs",
            "Of the queue: 200 µs held for others to join although an executor could have run it; 100 µs behind running batches",
            "Batch 7 of 3 row(s), of 8 possible, was sealed because its oldest row had waited as long as promised",
            "policy generation 2",
            "2 other request(s) shared it, of lengths 3 to 9: 9, 3.",
            "padded to 10: 13 of 30 cells (43 %) were padding, 5 of them behind its own row(s)",
            "It ran for 500 µs on executor 0; 400 µs had been expected.",
            "Most of it, 59 %, was running, of which a large share was padding",
        ] {
            assert!(told.contains(part), "{part:?} is not in\n{told}");
        }
    }

    #[test]
    fn a_request_that_was_sent_late_took_longer_for_its_caller_than_for_the_server() {
        let told = Story { late_us: 155.0, ..story() }.sentences();
        assert_eq!(told[1], "It was sent 155 µs later than its caller meant to: 1.00 ms in all.");
        assert!(!story().sentences()[1].contains("later"));
    }

    #[test]
    fn what_took_longest_is_named_with_the_knob_that_it_depends_on() {
        let most = |change: fn(&mut Times)| {
            let mut story = story();
            change(&mut story.times_us);
            story.sentences().pop().expect("the last sentence")
        };
        assert!(most(|t| t.held = 5e6).contains("queue_delay_max_us"));
        assert!(most(|t| t.behind = 5e6).contains("waiting for an executor"));
        assert!(most(|t| t.wait = 5e6).contains("executor.slots"));
        assert!(most(|t| t.scatter = 5e6).contains("writing the answer"));
        assert!(most(|t| t.other = 5e6).contains("weight"));
    }

    #[test]
    fn a_batch_that_still_runs_has_no_story() {
        assert_eq!(Story::of(&record(1, 0), "echo"), None);
    }

    #[test]
    fn a_story_is_the_same_after_json() {
        let text = serde_json::to_string(&story()).expect("plain data");
        assert_eq!(serde_json::from_str::<Story>(&text).expect("as written"), story());
    }
}
