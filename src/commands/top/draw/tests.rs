use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::super::model::{Decision, PARTS};
use super::*;

/// Two executors and three models, one of them busy.
fn busy() -> View {
    let waterfall = |shares: [f64; 9]| PARTS.iter().copied().zip(shares).collect();
    let quiet = |name: &str| Model {
        name: name.to_owned(),
        requests_per_s: 0.0,
        errors_per_s: 0.0,
        rows_per_s: 0.0,
        in_flight: 0.0,
        queue_rows: 0.0,
        fill: None,
        padding: None,
        queue: [None; 2],
        service: [None; 2],
        closed: Vec::new(),
        errors: Vec::new(),
        generation: 1,
        policy: "cost".into(),
        knobs: vec![("rows_max".into(), "32".into())],
    };
    let minilm = Model {
        requests_per_s: 812.4,
        errors_per_s: 3.5,
        rows_per_s: 12_345.0,
        in_flight: 64.0,
        queue_rows: 17.0,
        fill: Some(0.625),
        padding: Some(0.031),
        queue: [Some(0.000_85), Some(0.0124)],
        service: [Some(0.0231), Some(1.25)],
        closed: vec![("idle".into(), 0.75), ("full".into(), 0.25)],
        errors: vec![("overloaded".into(), 3.5)],
        generation: 3,
        knobs: vec![("rows_max".into(), "64".into()), ("queue_delay_max_us".into(), "auto".into())],
        ..quiet("minilm")
    };
    let sealed = "sealed: idle, 5 rows of 64, 5 waited, 2.1ms on executor 1".to_owned();
    View {
        uptime: 200.0,
        span: 1.0,
        requests_per_s: 812.4,
        in_flight: 64.0,
        connections: 8.0,
        resident_bytes: 123.0 * 1048576.0,
        executors: vec![
            Executor { number: 0, inline: false, shares: waterfall([0.5, 0.1, 0.05, 0.1, 0.0, 0.0, 0.0, 0.05, 0.2]) },
            Executor { number: 1, inline: false, shares: waterfall([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]) },
        ],
        waterfall: true,
        models: vec![quiet("echo"), minilm, quiet("a-model-with-a-very-long-name")],
        decisions: vec![
            Decision { model: "minilm".into(), age_s: 0.012, what: sealed },
            Decision { model: "echo".into(), age_s: 0.1, what: "held: 1 rows, for 500us at most".into() },
            Decision { model: "minilm".into(), age_s: 0.5, what: "shed: 1 rows of 16".into() },
        ],
        findings: Some((
            "minilm".into(),
            vec!["rows_max_above_in_flight: rows_max is 64, but callers can have at most 20 rows in flight [change rows_max]".into()],
        )),
    }
}

fn shown(chosen: &str) -> Shown {
    Shown { server: "127.0.0.1:7601".into(), chosen: Some(chosen.into()), ..Shown::default() }
}

/// The screen, line by line.
fn screen(view: Option<&View>, shown: &Shown, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal in memory");
    terminal.draw(|frame| draw(view, shown, frame.area(), frame.buffer_mut())).expect("drawing in memory");
    let buffer = terminal.backend().buffer();
    let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned() + "\n";
    (0..height).map(line).collect()
}

#[test]
fn a_screen_of_80_by_24_has_all_of_a_busy_server() {
    let found = screen(Some(&busy()), &shown("minilm"), 80, 24);
    assert_eq!(found, include_str!("screen_80x24.txt"), "{found}");
}

#[test]
fn a_wide_screen_has_more_columns() {
    let found = screen(Some(&busy()), &shown("echo"), 120, 20);
    assert_eq!(found, include_str!("screen_120x20.txt"), "{found}");
}

#[test]
fn without_colour_nothing_is_coloured_and_with_it_the_characters_are_the_same() {
    let drawn = |color: bool| {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).expect("a terminal in memory");
        let shown = Shown { color, ..shown("minilm") };
        terminal
            .draw(|frame| draw(Some(&busy()), &shown, frame.area(), frame.buffer_mut()))
            .expect("drawing in memory");
        terminal.backend().buffer().clone()
    };
    let (plain, coloured) = (drawn(false), drawn(true));
    assert!(plain.content.iter().all(|cell| cell.fg == Color::Reset && cell.bg == Color::Reset));
    assert!(coloured.content.iter().any(|cell| cell.fg == Color::Green));
    let symbols = |buffer: &Buffer| buffer.content.iter().map(|cell| cell.symbol().to_owned()).collect::<Vec<_>>();
    assert_eq!(symbols(&plain), symbols(&coloured));
}

#[test]
fn any_size_is_drawn_and_the_chosen_model_is_in_sight() {
    let mut many = busy();
    let more = (0..40).map(|n| Model { name: format!("model-{n}"), ..many.models[0].clone() }).collect::<Vec<_>>();
    many.models.extend(more);
    for (width, height) in [(1, 1), (3, 2), (20, 5), (40, 8), (80, 12), (80, 24), (200, 60), (500, 200)] {
        for help in [false, true] {
            let shown = Shown { help, ..shown("model-39") };
            let found = screen(Some(&many), &shown, width, height);
            if !help && width >= 40 && height >= 12 {
                assert!(found.contains("> model-39"), "{width}×{height}:\n{found}");
            }
        }
    }
}

#[test]
fn a_server_that_is_gone_is_said_above_what_was_last_seen() {
    let trouble = Some("control port 127.0.0.1:7601: GET /metrics: refused; trying again".to_owned());
    let found = screen(Some(&busy()), &Shown { trouble: trouble.clone(), ..shown("minilm") }, 80, 24);
    assert_eq!(found.lines().nth(1), Some("! control port 127.0.0.1:7601: GET /metrics: refused; trying again"));
    assert!(found.contains("> minilm"), "{found}");
    let found = screen(None, &Shown { trouble, ..shown("minilm") }, 80, 24);
    assert!(found.contains("trying again") && found.contains("q quit"), "{found}");
}

#[test]
fn the_help_fits_80_columns_and_hides_the_rest() {
    assert!(HELP.iter().all(|line| line.chars().count() <= 80), "{HELP:#?}");
    let found = screen(Some(&busy()), &Shown { help: true, ..shown("minilm") }, 80, 24);
    assert!(found.contains("choose a model") && !found.contains("> minilm"), "{found}");
}

#[test]
fn names_from_a_server_cannot_move_the_cursor() {
    let mut view = busy();
    view.models[1].name = "mini\x1b[2Jlm\n".into();
    let found = screen(Some(&view), &shown("echo"), 80, 24);
    assert!(!found.contains('\x1b') && found.contains("mini [2Jlm"), "{found}");
}

#[test]
fn the_cells_of_a_bar_are_its_shares_and_fill_it() {
    for width in [10, 31, 60] {
        for executor in &busy().executors {
            let cells = fill(&executor.shares, width);
            assert_eq!(cells.iter().map(|(_, cells)| cells).sum::<usize>(), width);
            for ((_, cells), (_, share)) in cells.iter().zip(&executor.shares) {
                assert!((*cells as f64 - share * width as f64).abs() <= 1.0);
            }
        }
    }
}

#[test]
fn numbers_and_times_are_short() {
    let numbers = [0.0, 0.04, 3.24, 12.0, 99.9, 412.4, 9_999.0, 12_345.0, 999_900.0, 1.3e6, 4.2e9];
    let expected = ["0", "0", "3.2", "12", "99.9", "412", "9999", "12.3k", "999.9k", "1.3M", "4.2G"];
    assert_eq!(numbers.map(number), expected);
    let times = [0.0, 85e-6, 999.4e-6, 1.2e-3, 99.94e-3, 0.34, 2.5, 123.0, 700.0];
    assert_eq!(
        times.map(|seconds| time(Some(seconds))),
        ["0us", "85us", "999us", "1.2ms", "99.9ms", "340ms", "2.5s", "123s", "12m"]
    );
    assert_eq!([5.0, 200.0, 7_500.0, 360_000.0].map(span), ["5s", "3m20s", "2h05m", "4d04h"]);
}

#[test]
fn as_text_it_is_the_same_without_the_keys() {
    let text = to_text(&busy(), &shown("minilm"), 80, 40);
    let screen = screen(Some(&busy()), &shown("minilm"), 80, 41);
    assert!(screen.starts_with(text.trim_end()), "{text}\n---\n{screen}");
    assert!(!text.contains("q quit") && text.ends_with("shed: 1 rows of 16\n"), "{text}");
}
