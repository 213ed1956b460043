//! What is asked of the shadow thread, and what it has found: read and written by the control port, off every request's way.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::{Judged, Knobs, Word};
use crate::replay::ledger::ModelReport;
use crate::vocab::{ModelHandle, Moment};

/// The figures of a model's window.
#[derive(Clone, Debug)]
pub struct View {
    pub begin: Moment,
    pub end: Moment,
    /// Time that its stretches cover.
    pub covered: Duration,
    pub stretches: usize,
    pub guessed: u64,
    pub real: ModelReport,
    pub as_is: ModelReport,
    pub shadows: Vec<Result<ModelReport, String>>,
}

/// One model's part.
#[derive(Clone, Debug, Default)]
pub struct Panel {
    pub settings: Vec<Knobs>,
    /// Raised with each change of the settings: figures of other ones are not shown.
    pub(super) edition: u64,
    pub view: Option<View>,
    /// Stretches that were dropped, or during which the policy changed.
    pub lost: u64,
    pub mixed: u64,
    /// The last prediction that was compared with what came: of these knobs.
    pub judged: Option<(Knobs, Judged)>,
    /// Why no stretch could be used, if the last could not.
    pub trouble: Option<String>,
}

/// The panels of all models.
#[derive(Debug)]
pub struct Board {
    panels: Mutex<Vec<Panel>>,
    words: flume::Sender<Word>,
}

impl Board {
    pub fn new(models: usize, words: flume::Sender<Word>) -> Board {
        Board { panels: Mutex::new(vec![Panel::default(); models]), words }
    }

    pub(super) fn panels(&self) -> MutexGuard<'_, Vec<Panel>> {
        self.panels.lock().expect("nobody panics while holding the panels")
    }

    /// A model's panel as it is.
    pub fn panel(&self, model: ModelHandle) -> Panel {
        self.panels()[model.index()].clone()
    }

    /// Settings of all models together, but for this one.
    pub fn others(&self, model: ModelHandle) -> usize {
        let panels = self.panels();
        panels.iter().enumerate().filter(|(at, _)| *at != model.index()).map(|(_, panel)| panel.settings.len()).sum()
    }

    /// From now on these settings are looked at for a model; none: nothing is.
    pub fn set(&self, model: ModelHandle, settings: Vec<Knobs>) {
        {
            let panel = &mut self.panels()[model.index()];
            let judged = panel.judged.take();
            *panel = Panel { settings, edition: panel.edition + 1, judged, ..Panel::default() };
        }
        // Full: it has a word to read already.
        let _ = self.words.try_send(Word::Changed);
    }

    /// Ends the thread.
    pub fn stop(&self) {
        let _ = self.words.send(Word::Stop);
    }
}
