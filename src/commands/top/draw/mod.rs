//! What is shown, as cells of a terminal. Pure: a view and a size in, characters out.
//!
//! Always true
//! - Nothing is said by colour alone: the parts of a bar have marks of their own, and the chosen line has a `>`.
//! - It fits whatever there is from 40×8 up: what has no room is left out, the least important first.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};

use super::model::{Executor, Model, Part, PartKind, Sort, View};

/// What the person at the keyboard chose, and what went wrong.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    pub server: String,
    /// The chosen model.
    pub chosen: Option<String>,
    pub sort: Sort,
    pub paused: bool,
    pub help: bool,
    pub color: bool,
    /// Why there is nothing newer.
    pub trouble: Option<String>,
}

const HELP: &[&str] = &[
    "q        quit                       p   pause, and go on",
    "up down  choose a model (and tab)   s   sort: req/s, queue, queue p99, padding",
    "?        this page                  r   read now",
    "",
    "req/s    requests that ended        infl  accepted and not ended",
    "queue    rows that wait now         fill  rows, of those there was place for",
    "pad      padding, of all cells      q     queue delay of a request",
    "                                    s     service time of a batch",
    "",
    "bars     where an executor's time went: useful work, padding, overhead of",
    "         launches and copies; idle while work waited (h held for a fuller",
    "         batch, p packing, m mailbox, c copy, s scatter); idle with an empty",
    "         queue. A server without a waterfall says busy and idle.",
];

/// Rows of executors: more are summed up.
const EXECUTORS_MAX: usize = 8;
/// Of the table without its names.
const COLUMNS_WIDTH: usize = 68;
const KEYS: &str = " q quit  up/down model  s sort  p pause  r read now  ? help";

/// A place to write lines to, from the top.
struct Page<'a> {
    buffer: &'a mut Buffer,
    area: Rect,
    row: u16,
    color: bool,
}

impl Page<'_> {
    fn left(&self) -> usize {
        usize::from(self.area.height - self.row)
    }

    fn width(&self) -> usize {
        usize::from(self.area.width)
    }

    fn style(&self, color: Color, modifier: Modifier) -> Style {
        let style = Style::new().add_modifier(modifier);
        if self.color { style.fg(color) } else { style }
    }

    fn line(&mut self, text: &str, style: Style) {
        if self.left() > 0 {
            let at = self.area.y + self.row;
            self.buffer.set_stringn(self.area.x, at, printable(text), self.width(), style);
            self.row += 1;
        }
    }

    fn plain(&mut self, text: &str) {
        self.line(text, Style::new());
    }

    /// A line over the whole width, reversed.
    fn title(&mut self, text: &str) {
        let text = format!("{text:<width$}", width = self.width());
        self.line(&text, Style::new().add_modifier(Modifier::REVERSED));
    }
}

/// Names and sentences come from a server: nothing of them moves the cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Draws everything. Without a view nothing was read yet.
pub fn draw(view: Option<&View>, shown: &Shown, area: Rect, buffer: &mut Buffer) {
    let area = area.intersection(buffer.area);
    if area.is_empty() {
        return;
    }
    // The last line is for the keys.
    let body = Rect { height: area.height - 1, ..area };
    let mut page = Page { buffer, area: body, row: 0, color: shown.color };
    header(view, shown, &mut page);
    match (shown.help, view) {
        (true, _) => HELP.iter().for_each(|line| page.plain(line)),
        (false, None) => {}
        (false, Some(view)) => content(view, shown, &mut page),
    }
    let at = area.y + area.height - 1;
    let state = if shown.paused { " [paused]" } else { "" };
    let keys = format!("{KEYS}  (by {}){state}", shown.sort.name());
    let style = page.style(Color::DarkGray, Modifier::empty());
    page.buffer.set_stringn(area.x, at, keys, usize::from(area.width), style);
}

fn header(view: Option<&View>, shown: &Shown, page: &mut Page<'_>) {
    let server = &shown.server;
    match view {
        Some(view) => page.title(&format!(
            " ferry top {server}  up {}  {} req/s  {} in flight  {} conn  {} MiB",
            span(view.uptime),
            number(view.requests_per_s),
            view.in_flight,
            view.connections,
            (view.resident_bytes / f64::from(1 << 20)).round(),
        )),
        None => page.title(&format!(" ferry top {server}")),
    }
    if let Some(trouble) = &shown.trouble {
        let style = page.style(Color::Red, Modifier::BOLD);
        page.line(&format!("! {trouble}"), style);
    }
}

fn content(view: &View, shown: &Shown, page: &mut Page<'_>) {
    executors(view, page);
    let mut models = view.models.clone();
    shown.sort.apply(&mut models);
    let at = chosen(&models, shown.chosen.as_deref());
    table(&models, at, page);
    let Some(model) = models.get(at) else { return };
    detail(model, page);
    // Findings have up to half of what is left, decisions the rest.
    if let Some((_, sentences)) = view.findings.as_ref().filter(|(name, _)| *name == model.name) {
        let (most, width) = (page.left() / 2, page.width());
        for line in sentences.iter().flat_map(|sentence| wrap(&format!("! {sentence}"), width)).take(most) {
            let style = page.style(Color::Yellow, Modifier::empty());
            page.line(&line, style);
        }
    }
    let own = view.decisions.iter().filter(|decision| decision.model == model.name);
    let lines: Vec<String> = own
        .take(page.left())
        .map(|decision| format!("{:>8} ago  {}", time(Some(decision.age_s)), decision.what))
        .collect();
    lines.iter().for_each(|line| page.plain(line));
}

/// Place of the chosen model, or of the first.
pub fn chosen(models: &[Model], name: Option<&str>) -> usize {
    models.iter().position(|model| Some(model.name.as_str()) == name).unwrap_or(0)
}

fn executors(view: &View, page: &mut Page<'_>) {
    // The table and its model come first where there is little room.
    let room = EXECUTORS_MAX.min(page.left().saturating_sub(8 + view.models.len().min(6)).max(1));
    let shown = view.executors.len().min(room);
    for executor in &view.executors[..shown] {
        bar(executor, page);
    }
    if view.executors.len() > shown {
        page.plain(&format!("       and {} more", view.executors.len() - shown));
    }
    let legend = if view.waterfall {
        "# useful x pad o overhead  idle: h held p pack m mail c copy s scatter . empty"
    } else {
        "= busy . idle"
    };
    let style = page.style(Color::DarkGray, Modifier::empty());
    page.line(legend, style);
}

/// ` ex 0 [####xxo..........] useful 41 padding 12 …`
fn bar(executor: &Executor, page: &mut Page<'_>) {
    if page.left() == 0 {
        return;
    }
    let words: Vec<String> = executor
        .shares
        .iter()
        .filter(|(part, share)| part.kind != PartKind::Idle && *share >= 0.005)
        .take(4)
        .map(|(part, share)| format!("{} {:.0}%", part.name, 100.0 * share))
        .collect();
    let words = if executor.shares.is_empty() { "no time passed".to_owned() } else { words.join(" ") };
    // The batcher's own thread, for models that are placed there.
    let kind = if executor.inline { "in" } else { "ex" };
    let width = page.width().saturating_sub(8 + 2 + 44).clamp(10, 60);
    let line = format!("{kind} {:>3} [{:width$}] {words}", executor.number, "");
    let (x, y) = (page.area.x + 8, page.area.y + page.row);
    page.plain(&line);
    let mut at = 0;
    for (part, cells) in fill(&executor.shares, width) {
        let style = page.style(color(part.kind), Modifier::empty());
        for _ in 0..cells {
            page.buffer.set_stringn(
                x + at as u16,
                y,
                part.mark.to_string(),
                page.width().saturating_sub(8 + at),
                style,
            );
            at += 1;
        }
    }
}

fn color(kind: PartKind) -> Color {
    match kind {
        PartKind::Work => Color::Green,
        PartKind::Waste => Color::Yellow,
        PartKind::Held => Color::Red,
        PartKind::Idle => Color::DarkGray,
    }
}

/// Cells of each part: they add up to `width`, and each is at most one from its share.
fn fill(shares: &[(Part, f64)], width: usize) -> Vec<(Part, usize)> {
    let (mut sum, mut drawn) = (0.0, 0);
    shares
        .iter()
        .map(|(part, share)| {
            sum += share;
            let to = ((sum * width as f64).round() as usize).min(width);
            let cells = to - drawn;
            drawn = to;
            (*part, cells)
        })
        .collect()
}

fn table(models: &[Model], at: usize, page: &mut Page<'_>) {
    let longest = models.iter().map(|model| model.name.chars().count()).max().unwrap_or(5);
    let names = longest.clamp(5, page.width().saturating_sub(COLUMNS_WIDTH).clamp(5, 32));
    let wide = page.width() >= 110;
    let mut head = format!(
        "  {:<names$} {:>7} {:>7} {:>5} {:>5} {:>4} {:>4} {:>6} {:>6} {:>6} {:>6}",
        "model", "req/s", "rows/s", "infl", "queue", "fill", "pad", "q p50", "q p99", "s p50", "s p99"
    );
    if wide {
        head += &format!(" {:>7} {:>4} {:<14}", "err/s", "gen", "policy");
    }
    let style = page.style(Color::Cyan, Modifier::BOLD);
    page.line(&head, style);
    // Two lines at least are left for the chosen one; the table is scrolled so that it is in sight.
    let room = page.left().saturating_sub(4).max(1).min(models.len());
    let first = at.saturating_sub(room.saturating_sub(1)).min(models.len() - room);
    for (place, model) in models.iter().enumerate().skip(first).take(room) {
        let mark = if place == at { '>' } else { ' ' };
        let name: String = model.name.chars().take(names).collect();
        let percent = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.0}%", 100.0 * share));
        let mut line = format!(
            "{mark} {name:<names$} {:>7} {:>7} {:>5} {:>5} {:>4} {:>4} {:>6} {:>6} {:>6} {:>6}",
            number(model.requests_per_s),
            number(model.rows_per_s),
            number(model.in_flight),
            number(model.queue_rows),
            percent(model.fill),
            percent(model.padding),
            time(model.queue[0]),
            time(model.queue[1]),
            time(model.service[0]),
            time(model.service[1]),
        );
        if wide {
            line += &format!(" {:>7} {:>4} {:<14}", number(model.errors_per_s), model.generation, model.policy);
        }
        let modifier = if place == at { Modifier::BOLD } else { Modifier::empty() };
        page.line(&line, Style::new().add_modifier(modifier));
    }
    if models.len() > room {
        page.plain(&format!("  {} of {} models", room, models.len()));
    }
}

fn detail(model: &Model, page: &mut Page<'_>) {
    let knobs: Vec<String> = model.knobs.iter().map(|(name, value)| format!("{name} {value}")).collect();
    let policy = if model.policy.is_empty() { "?" } else { &model.policy };
    let text = format!("{}: {policy}, generation {}, {}", model.name, model.generation, knobs.join(", "));
    let width = page.width();
    wrap(&text, width).iter().take(2).for_each(|line| page.plain(line));
    let closed: Vec<String> =
        model.closed.iter().map(|(reason, share)| format!("{reason} {:.0}%", 100.0 * share)).collect();
    if !closed.is_empty() {
        page.plain(&format!("batches closed by: {}", closed.join(", ")));
    }
    if !model.errors.is_empty() {
        let errors: Vec<String> =
            model.errors.iter().map(|(code, rate)| format!("{code} {}/s", number(*rate))).collect();
        let style = page.style(Color::Red, Modifier::empty());
        page.line(&format!("not answered: {}", errors.join(", ")), style);
    }
}

/// Words on lines of at most so many characters; a longer word is cut where it is drawn.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("begins with one");
        if last.is_empty() {
            last.push_str(word);
        } else if last.chars().count() + 1 + word.chars().count() <= width {
            last.push(' ');
            last.push_str(word);
        } else {
            lines.push(format!("  {word}"));
        }
    }
    lines
}

/// At most 7 characters: `0`, `3.2`, `412`, `12.4k`, `1.3M`.
fn number(value: f64) -> String {
    match value {
        value if value < 0.05 => "0".to_owned(),
        value if value < 99.95 && value.fract() != 0.0 => format!("{value:.1}"),
        value if value < 9_999.5 => format!("{value:.0}"),
        value if value < 999_950.0 => format!("{:.1}k", value / 1e3),
        value if value < 999_950_000.0 => format!("{:.1}M", value / 1e6),
        value => format!("{:.1}G", value / 1e9),
    }
}

/// At most 6 characters: `85us`, `1.2ms`, `340ms`, `2.5s`, `10m`.
pub fn time(seconds: Option<f64>) -> String {
    let Some(seconds) = seconds else { return "-".to_owned() };
    let us = seconds * 1e6;
    match us {
        us if us < 999.5 => format!("{us:.0}us"),
        us if us < 99_950.0 => format!("{:.1}ms", us / 1e3),
        us if us < 999_500.0 => format!("{:.0}ms", us / 1e3),
        us if us < 99_950_000.0 => format!("{seconds:.1}s"),
        us if us < 600_000_000.0 => format!("{seconds:.0}s"),
        _ => format!("{:.0}m", (seconds / 60.0).min(99_999.0)),
    }
}

/// `3m20s`, `2h05m`, `4d03h`.
fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The same as plain text, as long as there is something to say.
pub fn to_text(view: &View, shown: &Shown, width: u16, height: u16) -> String {
    let area = Rect::new(0, 0, width, height + 1);
    let mut buffer = Buffer::empty(area);
    draw(Some(view), shown, area, &mut buffer);
    let mut text = String::new();
    // Not the line of keys.
    for y in 0..height {
        let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        text += line.trim_end();
        text.push('\n');
    }
    text.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests;
