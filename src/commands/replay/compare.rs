//! `ferry replay --compare`: how much load each policy carries.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ferry::replay::compare::{Effort, Goodput, Row, compare, rows};
use indicatif::ProgressBar;

pub fn run(quick: bool, words: &str, seed: u64, as_json: bool) -> ExitCode {
    let effort = Effort { seed, ..if quick { Effort::QUICK } else { Effort::FULL } };
    let wanted: Vec<Row> = rows()
        .into_iter()
        .filter(|row| words.split_whitespace().all(|word| name_of(row).split(' ').any(|part| part == word)))
        .collect();
    if wanted.is_empty() {
        eprintln!("no row is called {words:?}; rows are such as \"gpu lognormal poisson\"");
        return ExitCode::from(2);
    }
    let table = measure(&wanted, &effort);
    if as_json {
        println!("{}", serde_json::to_string(&json(&table)).expect("plain data"));
    } else {
        print!("{}", text(&table));
    }
    ExitCode::SUCCESS
}

type Table<'a> = Vec<(&'a Row, f64, Vec<Goodput>)>;

fn name_of(row: &Row) -> String {
    format!("{} {} {}", row.hardware.name, row.lengths_name, row.pattern.name())
}

/// Rows side by side on all cores; the order of the table is that of the rows.
fn measure<'a>(rows: &'a [Row], effort: &Effort) -> Table<'a> {
    let bar = ProgressBar::new(rows.len() as u64 * 4);
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<(usize, f64, Vec<Goodput>)>> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get()).min(rows.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((at, row)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, rows.get(at)?)))
                {
                    let mut last = None;
                    let (limit, goodputs) = compare(row, effort, |kind, _| {
                        if last.replace(kind) != Some(kind) {
                            bar.inc(1);
                        }
                    });
                    found.lock().expect("nobody panics with it").push((at, limit, goodputs));
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut found = found.into_inner().expect("nobody panics with it");
    found.sort_by_key(|(at, ..)| *at);
    found.into_iter().map(|(at, limit, goodputs)| (&rows[at], limit, goodputs)).collect()
}

fn text(table: &Table<'_>) -> String {
    let mut text = format!(
        "Goodput with 99 % on time, as a share of the bound; behind it, what is on time at 1.5 × the best goodput, as a share of \
         its own.\n\n{:<24} {:>9}  {:>14} {:>14} {:>14} {:>14}  {:>8}\n",
        "", "bound/s", "window", "greedy_tokens", "buckets", "cost", "cost/best"
    );
    for (row, limit, goodputs) in table {
        text += &format!("{:<24} {limit:>9.0} ", name_of(row));
        for goodput in goodputs {
            text += &format!("  {:>6.3} ({:>4.2})", goodput.share, goodput.overload);
        }
        let best = goodputs[..3].iter().map(|goodput| goodput.share).fold(0.0, f64::max);
        text += &format!("  {:>8.3}\n", goodputs[3].share / best);
    }
    text += "\nSettings that the baselines were tuned to:\n";
    for (row, _, goodputs) in table {
        for goodput in &goodputs[..3] {
            text += &format!("{:<24} {:<14} {}\n", name_of(row), goodput.kind.name(), goodput.setting);
        }
    }
    text
}

fn json(table: &Table<'_>) -> serde_json::Value {
    let rows = table.iter().map(|(row, limit, goodputs)| {
        let policies: serde_json::Map<String, serde_json::Value> = goodputs
            .iter()
            .map(|goodput| {
                let value = serde_json::json!({
                    "rate": goodput.rate,
                    "share_of_bound": goodput.share,
                    "overload_share": goodput.overload,
                    "setting": goodput.setting,
                });
                (goodput.kind.name().to_owned(), value)
            })
            .collect();
        serde_json::json!({ "row": name_of(row), "bound": limit, "policies": policies })
    });
    serde_json::json!({ "on_time": ferry::replay::compare::ON_TIME, "rows": rows.collect::<Vec<_>>() })
}
