//! TensorFlow Serving: the file of `--batching_parameters_file`, a `BatchingParameters` message as text.
//!
//! Fields and their meaning: tensorflow/serving, servables/tensorflow/session_bundle_config.proto. Defaults: those of
//! `SharedBatchScheduler` (tensorflow, batching_util/shared_batch_scheduler.h): batches of 1,000, no wait, 10 batches in the queue,
//! one thread for each core. All numbers are wrapped: `max_batch_size { value: 128 }`.

use super::fields::{At, Fields};
use super::textproto::parse;
use super::{Fault, Format, ImportError, Imported, Options, Verdict};

/// Fields that no other format has.
pub const FIELDS_OF_ITS_OWN: &[&str] = &[
    "batch_timeout_micros",
    "max_enqueued_batches",
    "num_batch_threads",
    "thread_pool_name",
    "allowed_batch_sizes",
    "pad_variable_length_inputs",
];

const ROWS_DEFAULT: i64 = 1000;
const BATCHES_DEFAULT: i64 = 10;

pub fn read(text: &str, _: &Options) -> Result<Imported, ImportError> {
    let message = parse(text)?;
    let mut fields = Fields::new("", &message);
    let mut out = Imported::new(Format::TensorflowServing);

    let rows = wrapped(&mut fields, "max_batch_size", 1, 65_536)?;
    let rows_max = rows.map_or(ROWS_DEFAULT, |rows| rows.value);
    out.manifest.set("batching", "rows_max", rows_max);
    match rows {
        Some(rows) => out.note(
            Verdict::Taken,
            ("max_batch_size", Some(rows.at)),
            rows_max,
            &["batching.rows_max"],
            "Most rows of a batch. Where rows differ in length, padded_cells_max is the budget that counts: set it too.",
        ),
        None => out.note(
            Verdict::Assumed,
            ("max_batch_size", None),
            rows_max,
            &["batching.rows_max"],
            "The default there. Memory is made for batches of so many rows: set what you mean.",
        ),
    }

    let delay = wrapped(&mut fields, "batch_timeout_micros", 0, i64::MAX)?;
    let delay_us = delay.map_or(0, |delay| delay.value.min(super::DELAY_US_MAX));
    out.manifest.set("batching", "queue_delay_max_us", delay_us);
    out.note(
        if delay.is_some() { Verdict::Taken } else { Verdict::Assumed },
        ("batch_timeout_micros", delay.map(|delay| delay.at)),
        delay.map_or(0, |delay| delay.value),
        &["batching.queue_delay_max_us"],
        "Counted from when the oldest row came, and kept exactly. Leave it out and the policy `cost` waits as long as that pays.",
    );

    padding(&mut fields, &mut out)?;
    sizes(&mut fields, &mut out, rows_max)?;

    let batches = wrapped(&mut fields, "max_enqueued_batches", 1, 1 << 20)?;
    let enqueued = batches.map_or(BATCHES_DEFAULT, |batches| batches.value);
    out.manifest.set("queue", "rows_max", enqueued * rows_max);
    out.note(
        if batches.is_some() { Verdict::Changed } else { Verdict::Assumed },
        ("max_enqueued_batches", batches.map(|batches| batches.at)),
        enqueued,
        &["queue.rows_max"],
        format!(
            "Rows are counted here, not batches: {enqueued} × {rows_max}. Above it requests are answered `overloaded` \
             (there: UNAVAILABLE, after retries)."
        ),
    );

    let threads = wrapped(&mut fields, "num_batch_threads", 1, 1024)?;
    if let Some(threads) = threads {
        out.server.set("threads", "executors", threads.value);
        out.note(
            Verdict::Changed,
            ("num_batch_threads", Some(threads.at)),
            threads.value,
            &["threads.executors"],
            "Executors are the server's, shared by all models, and each computes on one thread: not more than there are cores. \
             There a batch thread hands its batch to a pool of threads.",
        );
    } else {
        out.note(
            Verdict::Assumed,
            ("num_batch_threads", None),
            "one for each core",
            &["threads.executors"],
            "Nothing is written: that is the default here too.",
        );
    }
    if let Some(name) = fields.message("thread_pool_name")? {
        let value = fields_of(&name).text("value")?.map_or("", |name| name.value);
        let why = "Threads are called ferry-executor-0 and on; there is one pool.";
        out.note(Verdict::Absent, ("thread_pool_name", Some(name.at)), value, &[], why);
    }
    for (name, found) in fields.rest() {
        let why = "BatchingParameters has no such field that ferry knows.";
        out.note(Verdict::Absent, (name, Some(found.at)), found.value, &[], why);
    }
    Ok(out)
}

fn fields_of<'a>(message: &At<&'a super::textproto::Message>) -> Fields<'a> {
    Fields::new("", message.value)
}

/// The number inside a wrapper message: 0 where it is empty.
fn wrapped(fields: &mut Fields<'_>, name: &str, least: i64, most: i64) -> Result<Option<At<i64>>, ImportError> {
    let Some(found) = fields.message(name)? else { return Ok(None) };
    let mut inside = Fields::new(name, found.value);
    let value = inside.integer("value", least, most)?.map_or(0, |found| found.value);
    let error = |field: String, expected: String, got: String| {
        Err(ImportError { at: Some(found.at), fault: Fault::Value { field, expected, got } })
    };
    if let Some((other, value)) = inside.rest().into_iter().next() {
        return error(inside.path(&other), "only `value`".into(), value.value.to_string());
    }
    if value < least {
        return error(name.to_owned(), format!("{{ value: {least} }} or more"), value.to_string());
    }
    Ok(Some(At { value, at: found.at }))
}

fn padding(fields: &mut Fields<'_>, out: &mut Imported) -> Result<(), ImportError> {
    let pads = fields.boolean("pad_variable_length_inputs")?;
    match pads {
        Some(pads) if pads.value => {
            out.manifest.set("batching", "pad_to", "longest");
            out.note(
                Verdict::Changed,
                ("pad_variable_length_inputs", Some(pads.at)),
                true,
                &["batching.pad_to"],
                "Rows are padded to the longest of their batch, with the input's own `pad` and not with data, and the model is told \
                 where they end. Models that can run rows end to end are not padded at all.",
            );
        }
        _ => out.note(
            if pads.is_some() { Verdict::Changed } else { Verdict::Assumed },
            ("pad_variable_length_inputs", pads.map(|pads| pads.at)),
            false,
            &[],
            "There requests of different lengths are refused a common batch. Here they always share one, padded or end to end: a \
             model without a dimension under [dims] has one length only.",
        ),
    }
    Ok(())
}

fn sizes(fields: &mut Fields<'_>, out: &mut Imported, rows_max: i64) -> Result<(), ImportError> {
    let sizes = fields.integers("allowed_batch_sizes", 1, 65_536)?;
    let Some(first) = sizes.first() else { return Ok(()) };
    let list: Vec<i64> = sizes.iter().map(|size| size.value).collect();
    let wrong = |message: String| Err(ImportError { at: Some(first.at), fault: Fault::Contradiction(message) });
    if !list.is_sorted_by(|a, b| a < b) {
        return wrong(format!("allowed_batch_sizes: expected increasing sizes, got {list:?}"));
    }
    if list.last() != Some(&rows_max) {
        return wrong(format!("allowed_batch_sizes: expected the last to be max_batch_size {rows_max}, got {list:?}"));
    }
    out.manifest.set("warmup", "rows", list.clone());
    out.note(
        Verdict::Changed,
        ("allowed_batch_sizes", Some(first.at)),
        format!("{list:?}"),
        &["warmup.rows"],
        "Batches are not filled up with rows that nobody sent, so every number of rows up to rows_max occurs. The sizes are only those \
         that are run before the model counts as ready.",
    );
    Ok(())
}
