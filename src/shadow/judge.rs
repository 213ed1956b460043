//! The last stretches of a model, and whether what was predicted came true after a switch. Pure.
//!
//! Always true
//! - All stretches of a window were served under one policy.
//! - A prediction is compared with as much time after the switch as it was made of (but for 2 %: stretches differ a little), all of
//!   it under the policy that it was of.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Knobs, STRETCHES};
use crate::mail::PredictionError;
use crate::replay::ledger::ModelReport;
use crate::vocab::Moment;

/// What came of one stretch, for one model.
#[derive(Clone, Debug)]
pub struct Sample {
    pub at: Moment,
    pub span: Duration,
    /// All knobs of the policy that served.
    pub base: Knobs,
    pub real: ModelReport,
    /// Simulated with nothing set.
    pub as_is: ModelReport,
    /// By setting: all knobs of its policy and what would have come of it, or why it cannot be.
    pub shadows: Vec<Result<(Knobs, ModelReport), String>>,
    /// Batches of the simulations whose time is a guess.
    pub guessed: u64,
}

/// A prediction beside what came.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The setting's place.
    pub shadow: usize,
    /// Covered time of each side.
    pub span: Duration,
    pub predicted: ModelReport,
    pub happened: ModelReport,
    pub errors: Vec<PredictionError>,
}

#[derive(Clone, Debug)]
struct Comparing {
    shadow: usize,
    predicted: ModelReport,
    needed: Duration,
    span: Duration,
    happened: Option<ModelReport>,
}

/// The last stretches of a model under one policy and the same settings.
#[derive(Clone, Debug, Default)]
pub struct Window {
    samples: VecDeque<Sample>,
    comparing: Option<Comparing>,
}

fn merged<'a>(mut reports: impl Iterator<Item = &'a ModelReport>) -> Option<ModelReport> {
    let mut sum = reports.next()?.clone();
    reports.for_each(|report| sum.merge(report));
    Some(sum)
}

impl Window {
    /// Another stretch. True: the policy became that of a setting meanwhile, and its prediction is being compared from here on.
    pub fn add(&mut self, sample: Sample) -> bool {
        let mut switched = false;
        if let Some(last) = self.samples.back()
            && last.base != sample.base
        {
            let place =
                last.shadows.iter().position(|shadow| matches!(shadow, Ok((knobs, _)) if *knobs == sample.base));
            self.comparing = place.and_then(|shadow| {
                let (needed, predicted) = (self.span(), self.shadow(shadow)?.ok()?);
                Some(Comparing { shadow, predicted, needed, span: Duration::ZERO, happened: None })
            });
            switched = self.comparing.is_some();
            self.samples.clear();
        }
        if let Some(comparing) = &mut self.comparing {
            comparing.span += sample.span;
            match &mut comparing.happened {
                Some(happened) => happened.merge(&sample.real),
                None => comparing.happened = Some(sample.real.clone()),
            }
        }
        if self.samples.len() == STRETCHES {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
        switched
    }

    /// A stretch was lost: the window begins anew, and so does what a prediction is compared with.
    pub fn lost(&mut self) {
        // The last one stays only to tell whether the policy changed meanwhile; its settings' predictions are of one stretch.
        let last = self.samples.pop_back();
        self.samples.clear();
        self.samples.extend(last);
        if let Some(comparing) = &mut self.comparing {
            (comparing.span, comparing.happened) = (Duration::ZERO, None);
        }
    }

    /// The comparison, once it is complete.
    pub fn take_judged(&mut self) -> Option<Judged> {
        // No two stretches are equally long, to the microsecond.
        let done = |comparing: &mut Comparing| comparing.span.mul_f64(1.02) >= comparing.needed;
        let Comparing { shadow, predicted, span, happened, .. } = self.comparing.take_if(done)?;
        let happened = happened?;
        let errors = errors(&predicted, &happened);
        Some(Judged { shadow, span, predicted, happened, errors })
    }

    pub fn len(&self) -> usize {
        self.samples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Begin and end of the window.
    pub fn bounds(&self) -> Option<(Moment, Moment)> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        Some((first.at, last.at + last.span))
    }

    /// Time that its stretches cover.
    pub fn span(&self) -> Duration {
        self.samples.iter().map(|sample| sample.span).sum()
    }

    pub fn guessed(&self) -> u64 {
        self.samples.iter().map(|sample| sample.guessed).sum()
    }

    pub fn real(&self) -> Option<ModelReport> {
        merged(self.samples.iter().map(|sample| &sample.real))
    }

    pub fn as_is(&self) -> Option<ModelReport> {
        merged(self.samples.iter().map(|sample| &sample.as_is))
    }

    /// What would have come of a setting, or why it cannot be. `None` before the first stretch.
    pub fn shadow(&self, place: usize) -> Option<Result<ModelReport, String>> {
        let shadows: Vec<_> = self.samples.iter().filter_map(|sample| sample.shadows.get(place)).collect();
        if let Some(error) = shadows.iter().find_map(|shadow| shadow.as_ref().err()) {
            return Some(Err(error.clone()));
        }
        merged(shadows.into_iter().filter_map(|shadow| shadow.as_ref().ok()).map(|(_, report)| report)).map(Ok)
    }
}

/// How far a prediction is off, as a share of what came; for the padding, which may be nothing, the difference of the shares.
/// Nothing where nobody was answered on a side.
fn errors(predicted: &ModelReport, happened: &ModelReport) -> Vec<PredictionError> {
    if predicted.answered == 0 || happened.answered == 0 {
        return Vec::new();
    }
    let seconds = |report: &ModelReport, share: f64| report.percentile(share).as_secs_f64();
    let relative = |what: &'static str, predicted: f64, happened: f64| {
        let error = if happened > 0.0 { (predicted / happened - 1.0).abs() } else { predicted };
        PredictionError { what, predicted, happened, error }
    };
    let (before, after) = (predicted.waste(), happened.waste());
    vec![
        relative("p50", seconds(predicted, 0.5), seconds(happened, 0.5)),
        relative("p99", seconds(predicted, 0.99), seconds(happened, 0.99)),
        relative("fill", predicted.fill(), happened.fill()),
        PredictionError { what: "waste", predicted: before, happened: after, error: (before - after).abs() },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::SHADOW_FIGURES;

    fn report(answers: u64, ms: u64, rows: u64) -> ModelReport {
        let mut report = ModelReport::new("m".into());
        report.answered = answers;
        report.latency.record_n(ms * 1_000_000, answers).expect("it grows");
        (report.rows, report.rows_possible, report.batches) = (rows, 100, 1);
        report
    }

    fn knobs(policy: &str) -> Knobs {
        vec![("policy".into(), policy.into())]
    }

    /// Served under `base`, with a setting of `window` and one that cannot be.
    fn sample(at: u64, base: &str, real: ModelReport, shadow: ModelReport) -> Sample {
        Sample {
            at: Moment(at * 1_000_000_000),
            span: Duration::from_secs(10),
            base: knobs(base),
            as_is: real.clone(),
            real,
            shadows: vec![Ok((knobs("window"), shadow)), Err("it cannot be".into())],
            guessed: 1,
        }
    }

    #[test]
    fn a_window_is_the_sum_of_its_last_stretches() {
        let mut window = Window::default();
        for at in 0..STRETCHES as u64 + 2 {
            assert!(!window.add(sample(10 * at, "cost", report(10 + at, 5, 50), report(10, 20, 90))));
        }
        assert_eq!((window.len(), window.span(), window.guessed()), (6, Duration::from_secs(60), 6));
        assert_eq!(window.bounds(), Some((Moment(20_000_000_000), Moment(80_000_000_000))));
        let real = window.real().expect("there are some");
        assert_eq!((real.answered, real.latency.len(), real.rows_possible), (12 + 13 + 14 + 15 + 16 + 17, 87, 600));
        let shadow = window.shadow(0).expect("there are some").expect("it can be");
        assert_eq!((shadow.answered, shadow.percentile(0.99).as_millis()), (60, 20));
        assert_eq!(window.shadow(1).expect("there are some").expect_err("it cannot be"), "it cannot be");
        assert!(window.shadow(2).is_none() && window.take_judged().is_none());
    }

    #[test]
    fn a_switch_to_a_setting_is_compared_over_as_much_time_as_was_predicted_from() {
        let mut window = Window::default();
        window.add(sample(0, "cost", report(100, 5, 50), report(100, 20, 90)));
        window.add(sample(10, "cost", report(100, 5, 50), report(100, 20, 90)));
        assert!(window.add(sample(30, "window", report(100, 25, 80), report(100, 25, 80))));
        assert_eq!(window.len(), 1, "what was before is another policy's");
        assert!(window.take_judged().is_none(), "20 s were predicted");
        let shorter = Duration::from_millis(9700);
        assert!(
            !window.add(Sample { span: shorter, ..sample(40, "window", report(100, 25, 80), report(100, 25, 80)) })
        );
        let judged = window.take_judged().expect("it is complete");
        assert_eq!((judged.shadow, judged.span, judged.happened.answered), (0, shorter + Duration::from_secs(10), 200));
        let error = |what: &str| judged.errors.iter().find(|error| error.what == what).expect("all are there").error;
        assert!((error("p99") - 0.2).abs() < 0.01 && (error("fill") - 0.125).abs() < 1e-9, "{:?}", judged.errors);
        assert!(error("waste").abs() < 1e-9);
        assert_eq!(judged.errors.iter().map(|error| error.what).collect::<Vec<_>>(), SHADOW_FIGURES);
        assert!(window.take_judged().is_none(), "once");
    }

    #[test]
    fn a_switch_to_something_else_or_back_is_compared_with_nothing() {
        let mut window = Window::default();
        window.add(sample(0, "cost", report(100, 5, 50), report(100, 20, 90)));
        assert!(!window.add(sample(10, "buckets", report(100, 5, 50), report(100, 20, 90))));
        assert!(window.add(sample(20, "window", report(100, 5, 50), report(100, 20, 90))));
        assert!(!window.add(sample(30, "cost", report(100, 5, 50), report(100, 20, 90))), "back too soon");
        // A setting that is in force predicts itself; a switch away from it is no switch to it.
        assert!((0..3).all(|_| window.take_judged().is_none()));
    }

    #[test]
    fn a_lost_stretch_begins_the_window_and_the_comparison_anew() {
        let mut window = Window::default();
        for at in 0..3 {
            window.add(sample(10 * at, "cost", report(100, 5, 50), report(100, 20, 90)));
        }
        window.lost();
        assert_eq!(window.len(), 1);
        window.add(sample(50, "window", report(7, 25, 80), report(100, 25, 80)));
        window.lost();
        assert!(window.take_judged().is_none());
        window.add(sample(70, "window", report(9, 25, 80), report(100, 25, 80)));
        assert_eq!(window.take_judged().expect("10 s were predicted").happened.answered, 9);
    }

    #[test]
    fn without_answers_there_is_no_error() {
        let mut window = Window::default();
        window.add(sample(0, "cost", report(0, 5, 50), report(0, 20, 90)));
        window.add(sample(10, "window", report(3, 5, 50), report(3, 20, 90)));
        assert_eq!(window.take_judged().expect("complete").errors, Vec::new());
    }
}
