//! The shadow thread: takes a stretch, gives it to the schedulers, tells what came of it.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::{BYTES_MAX, Board, CPU_SHARE, Knobs, SLICE, Sample, View, Window};
use crate::capture::{CaptureEnd, Ended, TraceReader, channel, end_chunk, next_number};
use crate::clock;
use crate::mail::{Prediction, Question, ToBatcher};
use crate::mailbox::{SendError, Sender, reply};
use crate::replay::exact::ReplayError;
use crate::replay::whatif::{Recording, Setting};
use crate::telemetry::{ShadowOutcome, Telemetry};
use crate::vocab::ModelHandle;

/// What the thread is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Settings changed.
    Changed,
    Stop,
}

/// How long the batcher may take for the next part of a stretch; it sends one each second.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Between two looks at how long it worked.
const STEPS: u32 = 64;
const SEED: u64 = 1;

/// All that the thread needs.
#[derive(Debug)]
pub struct Worker {
    /// Of the models, in the order of their handles.
    pub names: Vec<String>,
    pub batcher: Sender<ToBatcher>,
    pub board: Arc<Board>,
    pub telemetry: Arc<Telemetry>,
    pub words: flume::Receiver<Word>,
    /// Length of a stretch.
    pub stretch: Duration,
}

/// What is looked at for one model.
#[derive(Debug)]
struct Watched {
    model: ModelHandle,
    edition: u64,
    settings: Vec<Knobs>,
    window: Window,
    /// The policy's generation when a setting of it was put in force, and the setting.
    switched: Option<(u32, Knobs)>,
}

/// Keeps the thread within its share of a core.
struct Pace<'a> {
    words: &'a flume::Receiver<Word>,
    telemetry: &'a Telemetry,
    steps: u32,
    /// CPU time of the thread when it last rested.
    since: Duration,
    word: Option<Word>,
}

impl Pace<'_> {
    fn step(&mut self) {
        self.steps += 1;
        if self.steps >= STEPS {
            self.steps = 0;
            let used = clock::thread_cpu().saturating_sub(self.since);
            if used >= SLICE {
                self.rest(used);
            }
        }
    }

    /// Sleeps for as long as the share wants it after so much work.
    fn rest(&mut self, used: Duration) {
        self.telemetry.shadow().worked(used);
        self.pause(used.mul_f64(1.0 / CPU_SHARE - 1.0));
        self.since = clock::thread_cpu();
    }

    fn pause(&mut self, time: Duration) {
        // Told to stop: what is left is done without a rest, and takes a moment.
        if self.word != Some(Word::Stop)
            && let Ok(word) = self.words.recv_timeout(time)
        {
            self.word = Some(word);
        }
    }
}

/// What became of a try for a stretch.
enum Taken {
    /// A whole trace.
    Trace(Vec<u8>),
    Lost,
    /// Somebody has a word to say.
    Word(Word),
    /// There is no batcher any more.
    Gone,
}

impl Worker {
    pub fn run(self) {
        let mut watched: Vec<Watched> = Vec::new();
        let mut since = clock::thread_cpu();
        loop {
            self.follow_board(&mut watched);
            let word = if watched.is_empty() {
                self.words.recv().unwrap_or(Word::Stop)
            } else {
                match self.take_stretch() {
                    Taken::Word(word) => word,
                    Taken::Gone => Word::Stop,
                    taken => {
                        let telemetry = &self.telemetry;
                        let mut pace = Pace { words: &self.words, telemetry, steps: 0, since, word: None };
                        let work = AssertUnwindSafe(|| self.work(taken, &mut watched, &mut pace));
                        // It is beside what serves, and must not end it.
                        if catch_unwind(work).is_err() {
                            self.trouble(&mut watched, "a panic, which the log tells".to_owned());
                        }
                        let used = clock::thread_cpu().saturating_sub(pace.since);
                        pace.rest(used);
                        since = pace.since;
                        match pace.word {
                            Some(word) => word,
                            None => continue,
                        }
                    }
                }
            };
            if word == Word::Stop {
                return;
            }
        }
    }

    /// Takes over what is asked for by now. Windows of settings that stayed go on.
    fn follow_board(&self, watched: &mut Vec<Watched>) {
        let panels = self.board.panels();
        let mut before = std::mem::take(watched);
        for (at, panel) in panels.iter().enumerate().filter(|(_, panel)| !panel.settings.is_empty()) {
            let model = ModelHandle(at as u16);
            let kept = before.iter().position(|one| one.model == model && one.edition == panel.edition);
            watched.push(match kept {
                Some(place) => before.swap_remove(place),
                None => Watched {
                    model,
                    edition: panel.edition,
                    settings: panel.settings.clone(),
                    window: Window::default(),
                    switched: None,
                },
            });
        }
    }

    /// Has the batcher record a stretch.
    fn take_stretch(&self) -> Taken {
        let (sink, source) = channel();
        match self.batcher.send(ToBatcher::Shadow { time: self.stretch, sink }) {
            Ok(()) => {}
            Err(SendError::Full(_)) => return self.words.recv_timeout(PATIENCE).map_or(Taken::Lost, Taken::Word),
            Err(SendError::Closed(_)) => return Taken::Gone,
        }
        let (mut trace, mut next) = (Vec::new(), None);
        loop {
            let Ok(chunk) = source.chunks.recv_timeout(PATIENCE) else { break };
            if !trace.is_empty() {
                next = next_number(&chunk);
            }
            trace.extend_from_slice(&chunk);
            if let Ok(word) = self.words.try_recv() {
                return Taken::Word(word);
            }
            if trace.len() >= BYTES_MAX && next.is_some() {
                break;
            }
        }
        match (source.ended(), next) {
            (Some(ended @ Ended { end: CaptureEnd::Complete, .. }), _) => {
                trace.extend(end_chunk(ended));
                Taken::Trace(trace)
            }
            (Some(Ended { end: CaptureEnd::Stopped, .. }), _) => Taken::Gone,
            // Long enough: the recorder ends when it finds nobody.
            (None, Some(chunks)) if trace.len() >= BYTES_MAX => {
                trace.extend(end_chunk(Ended { end: CaptureEnd::Complete, chunks }));
                Taken::Trace(trace)
            }
            _ => Taken::Lost,
        }
    }

    fn work(&self, taken: Taken, watched: &mut [Watched], pace: &mut Pace<'_>) {
        let Taken::Trace(trace) = taken else {
            self.telemetry.shadow().stretch(ShadowOutcome::Lost);
            for one in watched {
                one.window.lost();
                self.edit(one, |panel| panel.lost += 1);
            }
            return pace.pause(self.stretch);
        };
        let recording = TraceReader::open(Cursor::new(trace))
            .map_err(ReplayError::Trace)
            .and_then(|reader| Recording::read_paced(reader, SEED, &mut || pace.step()));
        let as_is = recording.and_then(|recording| {
            let as_is = recording.what_if_paced(&[], SEED, &mut || pace.step())?;
            Ok((recording, as_is))
        });
        let (recording, as_is) = match as_is {
            Ok(made) => made,
            Err(error) => return self.trouble(watched, error.to_string()),
        };
        let verified = match &recording.recorded {
            Ok(verified) => verified,
            Err(error) => return self.trouble(watched, format!("its trace does not replay: {error}")),
        };
        self.telemetry.shadow().stretch(ShadowOutcome::Used);
        self.telemetry.shadow().covered(recording.span());
        for one in watched {
            let at = one.model.index();
            if recording.has_change_of(one.model) {
                self.telemetry.shadow().stretch(ShadowOutcome::Mixed);
                self.edit(one, |panel| panel.mixed += 1);
                continue;
            }
            let mut guessed = as_is.guessed;
            let run = |settings: &Knobs| {
                let of = |(key, value): &(String, String)| Setting {
                    model: self.names[at].clone(),
                    key: key.clone(),
                    value: value.clone(),
                };
                let settings: Vec<Setting> = settings.iter().map(of).collect();
                let knobs = recording.knobs_with(one.model, &settings)?;
                let report = recording.what_if_paced(&settings, SEED, &mut || pace.step())?;
                guessed += report.guessed;
                Ok((knobs, report.models[at].clone()))
            };
            let shadows = one.settings.iter().map(run).map(|run| run.map_err(|error: ReplayError| error.to_string()));
            let shadows: Vec<_> = shadows.collect();
            let sample = Sample {
                at: recording.header().at,
                span: recording.span(),
                base: recording.header().models[at].knobs.clone(),
                real: verified.report.models[at].clone(),
                as_is: as_is.models[at].clone(),
                shadows,
                guessed,
            };
            let base = sample.base.clone();
            if one.window.add(sample) {
                one.switched = self.generation(one.model).map(|generation| (generation, base));
            }
            self.tell(one);
        }
    }

    fn trouble(&self, watched: &mut [Watched], message: String) {
        tracing::warn!(message, "a stretch of the shadow schedulers could not be used");
        self.telemetry.shadow().stretch(ShadowOutcome::Differs);
        for one in watched {
            one.window.lost();
            self.edit(one, |panel| panel.trouble = Some(message.clone()));
        }
    }

    /// Changes the panel of a model, unless other settings are asked for by now.
    fn edit(&self, one: &Watched, change: impl FnOnce(&mut super::Panel)) {
        let panel = &mut self.board.panels()[one.model.index()];
        if panel.edition == one.edition {
            change(panel);
        }
    }

    /// Shows the window, and a comparison that is complete.
    fn tell(&self, one: &mut Watched) {
        let window = &mut one.window;
        let judged = window.take_judged();
        let shadows = (0..one.settings.len()).filter_map(|place| window.shadow(place)).collect();
        if let (Some((begin, end)), Some(real), Some(as_is)) = (window.bounds(), window.real(), window.as_is()) {
            let (covered, stretches, guessed) = (window.span(), window.len(), window.guessed());
            let view = View { begin, end, covered, stretches, guessed, real, as_is, shadows };
            self.edit(one, |panel| {
                panel.view = Some(view);
                panel.trouble = None;
            });
        }
        let Some(judged) = judged else { return };
        let setting = one.settings[judged.shadow].clone();
        for error in &judged.errors {
            self.telemetry.shadow_error(one.model, error.what, error.error);
        }
        if let Some((generation, _)) = one.switched.take() {
            let prediction = Prediction { span: judged.span, errors: judged.errors.clone() };
            let judged = ToBatcher::Judged { model: one.model, generation, prediction };
            // A history without it is whole all the same.
            let _ = self.batcher.send(judged);
        }
        self.edit(one, |panel| panel.judged = Some((setting, judged)));
    }

    /// The generation of a model's policy.
    fn generation(&self, model: ModelHandle) -> Option<u32> {
        let (reply, awaited) = reply();
        self.batcher.send(ToBatcher::Ask(Question::Policy { model, reply })).ok()?;
        awaited.wait(ANSWER_MAX).map(|(_, generation)| generation)
    }
}

#[cfg(test)]
mod tests {
    use std::thread::JoinHandle;

    use super::*;
    use crate::capture::Sink;
    use crate::mailbox::{Received, Receiver, mailbox};
    use crate::telemetry::ModelLabels;

    const MODEL: ModelHandle = ModelHandle(0);

    /// A running thread, and the mailbox of a batcher that the test plays.
    fn start() -> (Arc<Board>, Receiver<ToBatcher>, JoinHandle<()>) {
        let labels = [ModelLabels { name: "m".into(), version: "1".into() }];
        let (words_sender, words) = flume::bounded(4);
        let board = Arc::new(Board::new(1, words_sender));
        let (batcher, mailbox) = mailbox(4);
        let telemetry = Telemetry::new(&labels, 1, 0);
        let stretch = Duration::from_millis(1);
        let worker = Worker { names: vec!["m".into()], batcher, board: Arc::clone(&board), telemetry, words, stretch };
        (board, mailbox, std::thread::spawn(move || worker.run()))
    }

    fn hold(value: &str) -> Knobs {
        vec![("hold".to_owned(), value.to_owned())]
    }

    fn next(mailbox: &Receiver<ToBatcher>) -> Sink {
        match mailbox.recv_until(None, Duration::ZERO) {
            Received::Message(ToBatcher::Shadow { sink, .. }) => sink,
            other => panic!("expected a stretch to be asked for, got {other:?}"),
        }
    }

    #[test]
    fn while_nobody_asks_the_batcher_hears_nothing() {
        let (board, mailbox, thread) = start();
        board.set(MODEL, Vec::new());
        board.stop();
        thread.join().expect("it ends");
        assert!(mailbox.is_empty());
    }

    #[test]
    fn a_stretch_that_found_no_room_or_is_no_trace_is_counted_and_the_next_is_asked_for() {
        let (board, mailbox, thread) = start();
        board.set(MODEL, vec![hold("0"), hold("2")]);
        next(&mailbox).end(Ended { end: CaptureEnd::ReaderSlow, chunks: 0 });
        let mut second = next(&mailbox);
        assert_eq!((board.panel(MODEL).lost, board.panel(MODEL).settings.len()), (1, 2));
        second.send(b"this is no trace".to_vec()).expect("somebody reads");
        second.end(Ended { end: CaptureEnd::Complete, chunks: 1 });
        let mut third = next(&mailbox);
        let trouble = board.panel(MODEL).trouble.expect("it is told");
        assert!(trouble.contains("not a trace"), "{trouble}");
        // Asked for something else in the middle of a stretch: that begins anew.
        board.set(MODEL, vec![hold("1")]);
        third.send(vec![0; 8]).expect("somebody reads");
        next(&mailbox).end(Ended { end: CaptureEnd::Stopped, chunks: 0 });
        thread.join().expect("without a batcher it ends");
        assert_eq!((board.panel(MODEL).lost, board.panel(MODEL).trouble), (0, None), "of the settings before");
    }
}
