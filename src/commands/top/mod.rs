//! `ferry top`: where an executor's time goes, and what each model does, in a terminal.
//!
//! Always true
//! - The terminal is given back as it was, also after a panic.
//! - A server that does not answer freezes nothing: it is read by a thread of its own, the keys go on, and it is tried again
//!   each interval.
//! - Reading costs the server at most four requests an interval, of which two are questions to its batcher, and one for each policy
//!   that changed.
//!
//! Elsewhere: from readings to rows (model.rs), from rows to characters (draw.rs).

mod draw;
mod model;
mod openmetrics;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use ferry::clock;
use ferry::vocab::Moment;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use serde_json::Value;

use self::draw::{Shown, draw};
use self::model::{Reading, View, view};
use self::openmetrics::Metrics;
use super::http;
use super::load::{failed, resolve, wrong_use};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The server's control address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    control: String,
    /// Time between two readings, 250ms to 60s.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Prints one reading as text, of one interval, and ends.
    #[arg(long)]
    once: bool,
    /// The model to look at first.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
}

const INTERVAL_MIN: Duration = Duration::from_millis(250);
const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// Decisions of all models that are read: those of a quiet one stand between many of a busy one.
const DECISIONS: usize = 200;
/// Lines of `--once`.
const ONCE_LINES: u16 = 60;
/// How often keys and readings are looked for.
const TURN: Duration = Duration::from_millis(50);

fn interval(text: &str) -> Result<Duration, String> {
    let time = super::load::duration(text)?;
    if (INTERVAL_MIN..=INTERVAL_MAX).contains(&time) { Ok(time) } else { Err("expected 250ms to 60s".into()) }
}

pub fn run(args: &Args) -> ExitCode {
    let addr = match resolve(&args.control) {
        Ok(addr) => addr,
        Err(message) => return wrong_use(&message),
    };
    let color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let shown = Shown { server: args.control.clone(), chosen: args.model.clone(), color, ..Shown::default() };
    if args.once {
        return once(addr, args.interval, &shown);
    }
    if !std::io::stdout().is_terminal() {
        return wrong_use("standard output is no terminal: --once prints one reading as text");
    }
    match watch(addr, args.interval, shown) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&format!("the terminal: {error}")),
    }
}

/// Two readings, an interval apart.
fn once(addr: SocketAddr, interval: Duration, shown: &Shown) -> ExitCode {
    let mut policies = BTreeMap::new();
    let mut read = || read(addr, shown.chosen.as_deref(), &mut policies);
    let readings = read().and_then(|before| {
        std::thread::sleep(interval);
        Ok((before, read()?))
    });
    let (before, after) = match readings {
        Ok(readings) => readings,
        Err(message) => return failed(&message),
    };
    let width = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(120u16).clamp(40, 400);
    let text = draw::to_text(&view(Some(&before), &after), shown, width, ONCE_LINES);
    // Whoever reads it may have had enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// Reads everything. `policies` keeps what was read of policies that did not change since.
fn read(
    addr: SocketAddr,
    chosen: Option<&str>,
    policies: &mut BTreeMap<String, (u64, Value)>,
) -> Result<Reading, String> {
    let json = |path: &str| match http::request(addr, "GET", path, None)? {
        (200, value) => Ok(value),
        (status, value) => Err(format!("{path}: {} ({status})", value["error"].as_str().unwrap_or("").trim())),
    };
    let metrics = Metrics::parse(&http::text(addr, "/metrics")?)?;
    let mut reading = Reading { metrics, stats: json("/stats")?, ..Reading::default() };
    let names: Vec<String> = reading.models().into_iter().map(str::to_owned).collect();
    for name in &names {
        let generation = reading.metrics.sum("ferry_policy_generation", &[("model", name)]) as u64;
        if policies.get(name).is_none_or(|(known, _)| *known != generation) {
            // While a server starts there is nobody to ask: its policies come with a later reading.
            match json(&format!("/v1/models/{}/policy", http::segment(name))) {
                Ok(policy) => drop(policies.insert(name.clone(), (generation, policy))),
                Err(_) => break,
            }
        }
    }
    policies.retain(|name, _| names.contains(name));
    reading.policies = policies.iter().map(|(name, (_, policy))| (name.clone(), policy.clone())).collect();
    if let Ok(answer) = json(&format!("/v1/decisions?last={DECISIONS}")) {
        reading.decisions = answer["decisions"].as_array().cloned().unwrap_or_default();
    }
    let chosen = chosen.map(str::to_owned).filter(|name| names.contains(name)).or(names.first().cloned());
    if let Some(name) = chosen
        && let Ok(found) = json(&format!("/v1/models/{}/findings", http::segment(&name)))
    {
        reading.findings = Some((name, found));
    }
    Ok(reading)
}

/// A reading that somebody waits for: the chosen model goes in, what was read comes out.
struct Reader {
    asks: flume::Sender<Option<String>>,
    answers: flume::Receiver<Result<Reading, String>>,
    waiting: bool,
}

impl Reader {
    /// Starts the thread. It ends when the reader is dropped, after the request that it is in.
    fn start(addr: SocketAddr) -> std::io::Result<Reader> {
        let (asks, asked) = flume::bounded::<Option<String>>(1);
        let (answer, answers) = flume::bounded(1);
        std::thread::Builder::new().name("ferry-top".into()).spawn(move || {
            let mut policies = BTreeMap::new();
            for chosen in asked {
                if answer.send(read(addr, chosen.as_deref(), &mut policies)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Reader { asks, answers, waiting: false })
    }

    fn ask(&mut self, chosen: Option<&str>) {
        if !self.waiting {
            self.waiting = self.asks.try_send(chosen.map(str::to_owned)).is_ok();
        }
    }

    fn answer(&mut self) -> Option<Result<Reading, String>> {
        let answer = self.answers.try_recv().ok()?;
        self.waiting = false;
        Some(answer)
    }
}

/// What the keys do to what is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Nothing,
    ReadNow,
    Quit,
}

/// One key. The models are those in sight, in the server's order.
fn press(code: KeyCode, modifiers: KeyModifiers, shown: &mut Shown, view: Option<&View>) -> Wish {
    let mut step = |by: isize| {
        let mut models = view.map(|view| view.models.clone()).unwrap_or_default();
        shown.sort.apply(&mut models);
        if models.is_empty() {
            return Wish::Nothing;
        }
        let at = draw::chosen(&models, shown.chosen.as_deref()) as isize + by;
        let at = at.rem_euclid(models.len() as isize) as usize;
        shown.chosen = Some(models.swap_remove(at).name);
        // Its findings are not read yet.
        Wish::ReadNow
    };
    match code {
        KeyCode::Char('q') => return Wish::Quit,
        KeyCode::Esc if shown.help => shown.help = false,
        KeyCode::Esc => return Wish::Quit,
        KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return Wish::Quit,
        KeyCode::Down | KeyCode::Right | KeyCode::Tab | KeyCode::Char('j') => return step(1),
        KeyCode::Up | KeyCode::Left | KeyCode::BackTab | KeyCode::Char('k') => return step(-1),
        KeyCode::Char('p' | ' ') => shown.paused = !shown.paused,
        KeyCode::Char('s') => shown.sort = shown.sort.next(),
        KeyCode::Char('?' | 'h') => shown.help = !shown.help,
        KeyCode::Char('r') => return Wish::ReadNow,
        _ => {}
    }
    Wish::Nothing
}

fn watch(addr: SocketAddr, interval: Duration, mut shown: Shown) -> std::io::Result<()> {
    let mut reader = Reader::start(addr)?;
    let mut terminal = ratatui::try_init()?;
    let watched = (|| {
        let mut seen: Option<View> = None;
        // What rates are counted from, and the newest.
        let (mut base, mut last): (Option<Reading>, Option<Reading>) = (None, None);
        let mut due = Moment::ZERO;
        loop {
            let now = clock::now();
            if now >= due && !shown.paused {
                reader.ask(shown.chosen.as_deref());
                due = now + interval;
            }
            match reader.answer() {
                Some(Ok(reading)) => {
                    // One that somebody asked for in between has too little behind it to count rates by.
                    let newer = |last: &Reading| reading.uptime() - last.uptime() >= interval.as_secs_f64() / 2.0;
                    if last.as_ref().is_some_and(|last| newer(last) || reading.uptime() < last.uptime()) {
                        base = last.take();
                    }
                    seen = Some(view(base.as_ref(), &reading));
                    last = Some(reading);
                    shown.trouble = None;
                }
                Some(Err(message)) => shown.trouble = Some(format!("{message}; trying again")),
                None => {}
            }
            terminal.draw(|frame| draw(seen.as_ref(), &shown, frame.area(), frame.buffer_mut()))?;
            if !event::poll(TURN)? {
                continue;
            }
            // A resized terminal is drawn anew with the next turn.
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                match press(key.code, key.modifiers, &mut shown, seen.as_ref()) {
                    Wish::Quit => return Ok(()),
                    Wish::ReadNow => reader.ask(shown.chosen.as_deref()),
                    Wish::Nothing => {}
                }
            }
        }
    })();
    ratatui::try_restore()?;
    watched
}

#[cfg(test)]
mod tests {
    use super::model::Sort;
    use super::*;

    fn some_models() -> View {
        let page = "ferry_model_info{model=\"a\"} 1\nferry_model_info{model=\"b\"} 1\nferry_uptime_seconds 1\n# EOF\n";
        let reading = Reading { metrics: Metrics::parse(page).expect("a page"), ..Reading::default() };
        view(None, &reading)
    }

    #[test]
    fn keys_choose_pause_sort_and_quit() {
        let view = some_models();
        let mut shown = Shown::default();
        let mut key = |code| press(code, KeyModifiers::NONE, &mut shown, Some(&view));
        assert_eq!(key(KeyCode::Down), Wish::ReadNow);
        assert_eq!(key(KeyCode::Char('p')), Wish::Nothing);
        assert_eq!(key(KeyCode::Char('s')), Wish::Nothing);
        assert_eq!(key(KeyCode::Char('?')), Wish::Nothing);
        assert_eq!(key(KeyCode::Char('r')), Wish::ReadNow);
        assert_eq!(key(KeyCode::Char('q')), Wish::Quit);
        assert_eq!((shown.chosen.as_deref(), shown.paused, shown.sort), (Some("b"), true, Sort::Requests));
        assert!(shown.help);
        assert_eq!(
            press(KeyCode::Esc, KeyModifiers::NONE, &mut shown, Some(&view)),
            Wish::Nothing,
            "it closes the help"
        );
        assert_eq!(press(KeyCode::Esc, KeyModifiers::NONE, &mut shown, Some(&view)), Wish::Quit);
        assert_eq!(press(KeyCode::Char('c'), KeyModifiers::CONTROL, &mut shown, Some(&view)), Wish::Quit);
    }

    #[test]
    fn behind_the_last_model_is_the_first() {
        let view = some_models();
        let mut shown = Shown::default();
        for expected in ["b", "a", "b"] {
            press(KeyCode::Tab, KeyModifiers::NONE, &mut shown, Some(&view));
            assert_eq!(shown.chosen.as_deref(), Some(expected));
        }
        press(KeyCode::BackTab, KeyModifiers::NONE, &mut shown, Some(&view));
        assert_eq!(shown.chosen.as_deref(), Some("a"));
        assert_eq!(press(KeyCode::Down, KeyModifiers::NONE, &mut shown, None), Wish::Nothing, "nothing was read yet");
    }

    #[test]
    fn an_interval_that_would_burden_the_server_is_refused() {
        assert_eq!(interval("2s"), Ok(Duration::from_secs(2)));
        assert!(interval("10ms").is_err() && interval("2h").is_err() && interval("x").is_err());
    }
}
