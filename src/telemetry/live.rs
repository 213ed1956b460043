//! Counters as the dashboard takes them: per model, cumulative, so that any two readings can be subtracted.
//!
//! Always true
//! - A histogram is the place of its first bucket that counted anything, then the counts from there to the last that did.
//!   The bounds are said once, by [`bounds_json`].
//!
//! Elsewhere: cumulative totals of the server (export.rs).

use serde_json::{Map, Value, json};

use super::counters::ByCode;
use super::histogram::{COUNT_BOUNDS, Histogram, SHARE_BOUNDS, TIME_BOUNDS};
use super::{PADDINGS, Telemetry};
use crate::vocab::{Code, SealReason};

/// Upper bounds of the buckets of histograms, without the last, which has none.
pub fn bounds_json() -> Value {
    json!({
        "seconds": TIME_BOUNDS.map(|nanos| nanos as f64 / 1e9).as_slice(),
        "count": COUNT_BOUNDS,
        "share": SHARE_BOUNDS.map(|thousandths| thousandths as f64 / 1e3),
    })
}

impl Telemetry {
    /// One object for each labelled model, in the order of handles, and one for [`super::OTHER`] if anything was counted there.
    pub fn live_models_json(&self) -> Vec<Value> {
        let places = 0..self.models.len();
        let is_shown = |place: &usize| {
            let other = |place: usize| self.models[place].batches_total() > 0 || self.accepted(place) > 0;
            *place < self.labels.len() || other(*place)
        };
        places.filter(is_shown).map(|place| self.live_model_json(place)).collect()
    }

    /// What the rows of each tenant took since the start, by name; those for whom nothing ran are left out.
    pub fn live_tenants_json(&self) -> Value {
        let tenants = self.tenants.iter().enumerate();
        let told = tenants.filter(|(_, tenant)| tenant.executor_nanos.get() > 0).map(|(place, tenant)| {
            let cells = |of: fn(&super::counters::TenantCells) -> u64| -> u64 {
                self.models.iter().map(|model| of(&model.tenants[place])).sum()
            };
            let took = json!({
                "executor_seconds": tenant.executor_nanos.get() as f64 / 1e9,
                "cells_real": cells(|cells| cells.real.get()),
                "cells_padding": cells(|cells| cells.padding.get()),
            });
            (self.tenant_name(place).to_owned(), took)
        });
        told.collect::<Map<_, _>>().into()
    }

    fn accepted(&self, place: usize) -> u64 {
        self.shards.iter().map(|shard| shard.models[place].accepted.get()).sum()
    }

    fn live_model_json(&self, place: usize) -> Value {
        let model = &self.models[place];
        let by_code = |of: fn(&super::counters::ShardModel) -> &ByCode| -> Map<String, Value> {
            let count =
                |code: Code| -> u64 { self.shards.iter().map(|shard| of(&shard.models[place]).of(code).get()).sum() };
            let counts = Code::ALL.iter().map(|code| (code.name().to_owned(), count(*code)));
            counts.filter(|(_, count)| *count > 0).map(|(name, count)| (name, count.into())).collect()
        };
        let reasons = SealReason::ALL.iter().zip(&model.batches).filter(|(_, count)| count.get() > 0);
        let reasons: Map<String, Value> =
            reasons.map(|(reason, count)| (reason.name().to_owned(), count.get().into())).collect();
        let padding: Map<String, Value> = PADDINGS
            .iter()
            .zip(&model.padding)
            .map(|(cause, cells)| ((*cause).to_owned(), cells.get().into()))
            .collect();
        json!({
            "name": self.model_name(place),
            "version": self.labels.get(place).map(|labels| labels.version.as_str()),
            // Before accepted: what ends in between is in flight, never negative.
            "finished": by_code(|model| &model.finished),
            "refused": by_code(|model| &model.refused),
            "accepted": self.accepted(place),
            "batches": reasons,
            "rows": model.rows.get(),
            "rows_possible": model.rows_possible.get(),
            "cells_real": model.cells_real.get(),
            "cells_padded": model.cells_padded.get(),
            "padding": padding,
            "queue": {
                "rows": model.queue_rows.get(),
                "cells": model.queue_cells.get(),
                "bytes": model.queue_bytes.get(),
            },
            "verdicts": { "held": model.held.get(), "shed": model.shed.get(), "refused": model.refused.get() },
            "generation": model.policy_generation.get(),
            "cost_error": f64::from_bits(model.cost_error.get()),
            "batch_rows": sparse(&model.batch_rows),
            "queue_delay": sparse(&model.queue_delay),
            "service_time": sparse(&model.service_time),
        })
    }
}

fn sparse(histogram: &Histogram) -> Vec<u64> {
    let counts: Vec<u64> = histogram.snapshot().buckets.iter().map(|(_, count)| *count).collect();
    let Some(first) = counts.iter().position(|count| *count > 0) else { return Vec::new() };
    let last = counts.iter().rposition(|count| *count > 0).expect("there is a first");
    std::iter::once(first as u64).chain(counts[first..=last].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::telemetry::ModelLabels;
    use crate::vocab::ModelHandle;

    #[test]
    fn a_model_is_shown_with_what_was_counted_and_nothing_that_was_not() {
        let labels = |name: &str| ModelLabels { name: name.into(), version: "1".into() };
        let telemetry = Telemetry::new(&[labels("echo"), labels("digits")], 2, 1);
        let (echo, digits) = (ModelHandle(0), ModelHandle(1));
        telemetry.shard(0).accepted(echo, 3);
        telemetry.shard(1).finished(echo, Code::Ok, 2);
        telemetry.shard(1).refused(Some(digits), Code::Overloaded);
        telemetry.model(echo).batch_sealed(SealReason::Full, 3, 4, 12, 30, 48);
        telemetry.model(echo).queue_delay(Duration::from_micros(3));
        telemetry.model(echo).queue_delay(Duration::from_micros(9));
        let models = telemetry.live_models_json();
        assert_eq!(models.len(), 2, "nothing belongs to other models");
        assert_eq!(models[0]["name"], "echo");
        assert_eq!((&models[0]["accepted"], &models[0]["finished"]), (&json!(3), &json!({ "ok": 2 })));
        assert_eq!(models[0]["batches"], json!({ "full": 1 }));
        assert_eq!((&models[0]["rows"], &models[0]["rows_possible"]), (&json!(3), &json!(4)));
        // 1, 2, 3, 5, 10 µs: the third bucket has one and the fifth the other.
        assert_eq!(models[0]["queue_delay"], json!([2, 1, 0, 1]));
        assert_eq!(models[0]["batch_rows"], json!([2, 1]));
        assert_eq!((&models[1]["refused"], &models[1]["service_time"]), (&json!({ "overloaded": 1 }), &json!([])));
        telemetry.shard(0).accepted(ModelHandle(99), 1);
        assert_eq!(telemetry.live_models_json()[2]["name"], crate::telemetry::OTHER);
    }

    #[test]
    fn bounds_are_those_of_the_histograms() {
        let bounds = bounds_json();
        assert_eq!(bounds["seconds"].as_array().map(Vec::len), Some(TIME_BOUNDS.len()));
        assert_eq!(
            (&bounds["seconds"][0], &bounds["count"][3], &bounds["share"][1]),
            (&json!(1e-6), &json!(8), &json!(0.05))
        );
    }
}
