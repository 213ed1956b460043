//! The settings that a search may try: those of one model's policy, and the number of executors.
//!
//! Always true
//! - A point is written in one way only: a knob that its policy does not look at has the present value, a budget is as small as it
//!   can be without meaning less. So equal behaviour is tried once.
//! - Every point makes a policy without contradictions, and a batch that holds the largest request there is.
//!
//! Elsewhere: what the knobs do (scheduler/policy.rs), which points are tried when (search.rs).

use std::time::Duration;

use crate::scheduler::edges::{LengthHistogram, best_edges};
use crate::scheduler::{Edges, PadTo, Policy, PolicyKind};
use crate::vocab::Layout;

/// A setting.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Point {
    pub kind: PolicyKind,
    /// Window in ns. `None`: as long as it pays.
    pub delay: Option<u64>,
    pub rows_max: u32,
    pub cells_max: u64,
    /// Place in [`Space::buckets`].
    pub buckets: usize,
    pub pad_to_bucket: bool,
    pub layout: Layout,
    /// In hundredths.
    pub fill_waste: u32,
    pub executors: usize,
}

/// Where a search looks.
#[derive(Clone, Debug)]
pub struct Space {
    present: Policy,
    present_point: Point,
    /// As the knob takes them; the first are the present ones.
    buckets: Vec<String>,
    slo: Duration,
    /// Rows and cells of the largest request.
    least: (u32, u64),
    most: (u32, u64),
    /// Numbers of executors; the first is the present one.
    executors: Vec<usize>,
}

/// How far beyond the present budgets a search looks.
const ROWS_GROWTH: u32 = 4;
const CELLS_GROWTH: u64 = 8;
const ROWS_MOST: u32 = 1 << 16;
/// Numbers of buckets that are tried beside the present ones.
const SHAPES: [usize; 3] = [1, 4, 8];
const FILLS: [u32; 4] = [0, 12, 25, 50];

impl Space {
    /// Around `present`. `lens`: how long the rows are; `least`: rows and cells of the largest request, padded.
    pub fn new(
        present: Policy,
        lens: &LengthHistogram,
        slo: Duration,
        least: (u32, u64),
        executors: Vec<usize>,
    ) -> Space {
        assert!(!executors.is_empty(), "the present number of executors is the first");
        let own = present.get("buckets").expect("a knob");
        let mut buckets = vec![own.clone()];
        let forecasts = best_edges(lens, SHAPES[SHAPES.len() - 1] as u16);
        for count in SHAPES {
            let Some(forecast) = forecasts.get(count - 1) else { continue };
            let text = forecast.edges.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            if !buckets.contains(&text) {
                buckets.push(text);
            }
        }
        let longest = u64::from(present.buckets.longest());
        let rows_most = present.rows_max.saturating_mul(ROWS_GROWTH).min(ROWS_MOST);
        let cells = present.cells_max.min(u64::from(present.rows_max) * longest);
        let cells_most = (cells * CELLS_GROWTH).min(u64::from(rows_most) * longest);
        let present_point = Point {
            kind: present.kind,
            delay: present.queue_delay_max.map(|delay| delay.as_nanos() as u64),
            rows_max: present.rows_max,
            cells_max: present.cells_max,
            buckets: 0,
            pad_to_bucket: present.pad_to == PadTo::Bucket,
            layout: present.layout,
            fill_waste: (present.fill_waste_max * 100.0).round() as u32,
            executors: executors[0],
        };
        Space { present_point, present, buckets, slo, least, most: (rows_most, cells_most), executors }
    }

    pub fn present(&self) -> &Point {
        &self.present_point
    }

    pub fn present_policy(&self) -> &Policy {
        &self.present
    }

    /// Settings for the knobs of a point, all that a search may move. Of the present one: none, it is as it is.
    pub fn settings(&self, point: &Point) -> Vec<(&'static str, String)> {
        if *point == self.present_point {
            return Vec::new();
        }
        let delay = point.delay.map_or("auto".to_owned(), |nanos| (nanos as f64 / 1e3).to_string());
        let fill = match point.fill_waste == self.present_point.fill_waste {
            true => self.present.fill_waste_max.to_string(),
            false => (f64::from(point.fill_waste) / 100.0).to_string(),
        };
        vec![
            ("policy", point.kind.name().to_owned()),
            ("rows_max", point.rows_max.to_string()),
            ("cells_max", point.cells_max.to_string()),
            ("queue_delay_max_us", delay),
            ("buckets", self.buckets[point.buckets].clone()),
            ("pad_to", if point.pad_to_bucket { "bucket" } else { "longest" }.to_owned()),
            ("layout", point.layout.name().to_owned()),
            ("fill_waste_max", fill),
        ]
    }

    /// Knobs that differ from the present ones, as `ferry set` takes them.
    pub fn changes(&self, point: &Point) -> Vec<(&'static str, String)> {
        let settings = self.settings(point).into_iter();
        settings.filter(|(key, value)| self.present.get(key).as_ref() != Some(value)).collect()
    }

    /// How many those are; another number of executors counts as one.
    pub fn distance(&self, point: &Point) -> usize {
        self.changes(point).len() + usize::from(point.executors != self.present_point.executors)
    }

    /// The policy of a point, or why there is none.
    pub fn policy(&self, point: &Point) -> Result<Policy, String> {
        let settings = self.settings(point);
        if settings.is_empty() {
            return Ok(self.present.clone());
        }
        self.present.with(settings.iter().map(|(key, value)| (*key, value.as_str())))
    }

    /// Batches may become larger than those that the present server has memory for: it would have to be started anew.
    pub fn needs_restart(&self, point: &Point) -> bool {
        let cells =
            |point: &Point| point.cells_max.min(u64::from(point.rows_max) * u64::from(self.present.buckets.longest()));
        let present = &self.present_point;
        point.rows_max > present.rows_max || cells(point) > cells(present) || point.executors != present.executors
    }

    /// The one way in which this setting is written. `None`: it is none.
    pub fn canonical(&self, point: &Point) -> Option<Point> {
        let mut point = point.clone();
        let present = &self.present_point;
        let longest = u64::from(self.present.buckets.longest());
        if point.layout == Layout::Packed && !self.present.can_pack {
            return None;
        }
        let packed = point.layout == Layout::Packed;
        match point.kind {
            PolicyKind::GreedyTokens => point.delay = present.delay,
            // To wait as long as it pays is never, for those that do not know what pays.
            PolicyKind::Window | PolicyKind::Buckets => point.delay = Some(point.delay.unwrap_or(0)),
            PolicyKind::Cost => {}
        }
        if point.kind != PolicyKind::Buckets {
            point.fill_waste = present.fill_waste;
        }
        if packed {
            point.pad_to_bucket = present.pad_to_bucket;
        }
        let in_order = matches!(point.kind, PolicyKind::Window | PolicyKind::GreedyTokens);
        let by_length = match point.kind {
            PolicyKind::Buckets => true,
            // In order and padded to the longest row, they are in one queue and nothing is rounded up.
            _ => !packed && (!in_order || point.pad_to_bucket),
        };
        if !by_length {
            point.buckets = 0;
        }
        let shortest = self.shortest(point.buckets);
        point.cells_max = point.cells_max.clamp(longest.max(self.least.1), self.most.1.max(longest));
        point.rows_max = point.rows_max.clamp(self.least.0.max(1), self.most.0);
        point.cells_max = point.cells_max.min(u64::from(point.rows_max) * longest).max(longest);
        let by_cells = u32::try_from(point.cells_max / u64::from(shortest)).unwrap_or(u32::MAX).max(1);
        point.rows_max = point.rows_max.min(by_cells);
        if point.rows_max < self.least.0 || point.cells_max < self.least.1 {
            return None;
        }
        // Its knobs may be written otherwise than the present one's that mean the same.
        if point == self.canonical_present() {
            return Some(present.clone());
        }
        self.policy(&point).is_ok().then_some(point)
    }

    /// The shortest bucket: a manifest may not have more rows in a batch than fit its budget of cells at that length. Automatic
    /// ones may come to have one cell.
    fn shortest(&self, buckets: usize) -> u32 {
        if buckets == 0 && self.present.edges == Edges::Auto {
            return 1;
        }
        let first = self.buckets[buckets].split(',').next().and_then(|len| len.parse().ok());
        first.unwrap_or_else(|| self.present.buckets.len_at(0))
    }

    fn canonical_present(&self) -> Point {
        let mut point = self.present_point.clone();
        let longest = u64::from(self.present.buckets.longest());
        match point.kind {
            PolicyKind::Window | PolicyKind::Buckets => point.delay = Some(point.delay.unwrap_or(0)),
            PolicyKind::Cost | PolicyKind::GreedyTokens => {}
        }
        point.cells_max = point.cells_max.min(u64::from(point.rows_max) * longest).max(longest);
        let by_cells = u32::try_from(point.cells_max / u64::from(self.shortest(0))).unwrap_or(u32::MAX);
        point.rows_max = point.rows_max.min(by_cells.max(1));
        point
    }

    fn delay_of(&self, share: f64) -> Option<u64> {
        Some(round_to_two((self.slo.as_nanos() as f64 * share / 1e3).round() as u64) * 1000)
    }

    /// The coarse grid: who decides, for how long rows are held, and how large batches may be.
    pub fn grid(&self) -> Vec<Point> {
        let longest = u64::from(self.present.buckets.longest());
        let mut cells = vec![self.present_point.cells_max];
        cells.extend(std::iter::successors(Some(longest), |cells| Some(cells * 2)).take_while(|c| *c <= self.most.1));
        let rows = [self.present_point.rows_max, self.present_point.rows_max / 4, self.present_point.rows_max / 16];
        let mut found: Vec<Point> = Vec::new();
        for executors in &self.executors {
            for kind in PolicyKind::ALL {
                let mut delays: Vec<Option<u64>> = [0.0, 0.02, 0.1, 0.25, 0.5].map(|share| self.delay_of(share)).into();
                if kind == PolicyKind::Cost {
                    delays.insert(0, None);
                }
                for delay in delays {
                    for cells_max in &cells {
                        for rows_max in rows {
                            let point = Point {
                                kind,
                                delay,
                                rows_max: rows_max.max(1),
                                cells_max: *cells_max,
                                executors: *executors,
                                ..self.present_point.clone()
                            };
                            found.extend(self.canonical(&point));
                        }
                    }
                }
            }
        }
        let mut seen = std::collections::HashSet::new();
        found.retain(|point| *point != self.present_point && seen.insert(point.clone()));
        found
    }

    /// Settings that differ in one thing from this one: numbers by `factor`, the rest by any other value.
    pub fn neighbours(&self, point: &Point, factor: f64) -> Vec<Point> {
        let mut found = Vec::new();
        let mut with = |change: &dyn Fn(&mut Point)| {
            let mut other = point.clone();
            change(&mut other);
            found.extend(self.canonical(&other));
        };
        let scaled = |number: u64, by: f64| {
            let scaled = (number as f64 * by).round() as u64;
            if by > 1.0 { scaled.max(number.saturating_add(1)) } else { scaled.min(number.saturating_sub(1)) }
        };
        for by in [factor, 1.0 / factor] {
            with(&|p| p.rows_max = u32::try_from(scaled(p.rows_max.into(), by)).unwrap_or(u32::MAX));
            with(&|p| p.cells_max = scaled(p.cells_max, by));
            with(&|p| {
                let delay = |nanos: u64| round_to_two(scaled(nanos / 1000, by * by)) * 1000;
                p.delay = p.delay.map(|nanos| if nanos == 0 { self.delay_of(0.01).unwrap_or(0) } else { delay(nanos) });
            });
        }
        with(&|p| p.delay = Some(0));
        with(&|p| p.delay = None);
        for kind in PolicyKind::ALL {
            with(&|p| p.kind = kind);
        }
        for buckets in 0..self.buckets.len() {
            with(&|p| p.buckets = buckets);
        }
        with(&|p| p.pad_to_bucket = !p.pad_to_bucket);
        for layout in [Layout::Padded, Layout::Packed] {
            with(&|p| p.layout = layout);
        }
        for fill in FILLS {
            with(&|p| p.fill_waste = fill);
        }
        for executors in &self.executors {
            with(&|p| p.executors = *executors);
        }
        found.retain(|other| other != point);
        found
    }
}

/// A number that people would write: its first two digits.
fn round_to_two(number: u64) -> u64 {
    let unit = 10u64.pow(number.checked_ilog10().unwrap_or(0).saturating_sub(1));
    ((number + unit / 2) / unit) * unit
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::scheduler::Buckets;
    use crate::vocab::Moment;

    pub fn policy() -> Policy {
        Policy {
            can_pack: true,
            layout: Layout::Packed,
            ..Policy::new(32, 512, Buckets::new(&[16, 64, 256]).expect("ascending"))
        }
    }

    pub fn space(policy: Policy) -> Space {
        let mut lens = LengthHistogram::new(policy.buckets.longest());
        (0..1000).for_each(|n: u32| lens.observe(Moment(0), 1 + n * 7919 % policy.buckets.longest(), 1));
        Space::new(policy, &lens, Duration::from_millis(100), (1, 256), vec![2, 1])
    }

    /// Some points: the grid, and what lies around the present one and around some of the grid.
    fn points(space: &Space) -> Vec<Point> {
        let mut points = space.grid();
        let some: Vec<Point> = points.iter().step_by(7).cloned().chain([space.present().clone()]).collect();
        for factor in [2.0, 1.2] {
            points.extend(some.iter().flat_map(|point| space.neighbours(point, factor)));
        }
        points
    }

    #[test]
    fn every_point_makes_a_policy_that_holds_the_largest_request_and_is_written_in_one_way() {
        for present in [
            policy(),
            Policy { can_pack: false, layout: Layout::Padded, kind: PolicyKind::Window, ..policy() },
            Policy { edges: Edges::Auto, layout: Layout::Padded, queue_delay_max: Some(Duration::ZERO), ..policy() },
            Policy { rows_max: 1, cells_max: 256, ..policy() },
        ] {
            let space = space(present);
            let points = points(&space);
            assert!(points.len() > 50, "{}", points.len());
            for point in points {
                let policy = space.policy(&point).unwrap_or_else(|error| panic!("{point:?}: {error}"));
                assert!(policy.cells_max >= 256 && policy.rows_max >= 1);
                assert!(policy.rows_max <= 4 * space.present_policy().rows_max);
                if !space.present_policy().can_pack {
                    assert_eq!(policy.layout, Layout::Padded);
                }
                if point != *space.present() {
                    assert_eq!(space.canonical(&point).as_ref(), Some(&point), "it is canonical");
                }
            }
        }
    }

    #[test]
    fn a_knob_that_nobody_looks_at_is_not_varied() {
        let space = space(policy());
        let point = |kind, delay, buckets, fill_waste| Point {
            kind,
            delay,
            buckets,
            fill_waste,
            cells_max: 1024,
            ..space.present().clone()
        };
        let same = |a: Point, b: Point| space.canonical(&a).expect("one") == space.canonical(&b).expect("one");
        use PolicyKind::{Buckets, Cost, GreedyTokens, Window};
        assert!(same(point(GreedyTokens, Some(5), 1, 0), point(GreedyTokens, None, 0, 50)));
        assert!(same(point(Window, None, 1, 0), point(Window, Some(0), 0, 12)));
        assert!(!same(point(Cost, None, 0, 0), point(Cost, Some(0), 0, 0)), "never is not as long as it pays");
        assert!(!same(point(Buckets, Some(9), 0, 0), point(Buckets, Some(9), 1, 0)));
        assert!(!same(point(Buckets, Some(9), 0, 0), point(Buckets, Some(9), 0, 50)));
    }

    #[test]
    fn the_present_setting_is_known_in_any_spelling_and_sets_nothing() {
        let window = Policy { kind: PolicyKind::Window, cells_max: 1 << 30, ..policy() };
        let space = space(window);
        assert_eq!(space.settings(space.present()), []);
        let same = Point { delay: Some(0), cells_max: 32 * 256, ..space.present().clone() };
        assert_eq!(space.canonical(&same), Some(space.present().clone()));
    }

    #[test]
    fn larger_batches_and_other_executors_need_a_restart_and_smaller_batches_do_not() {
        let space = space(policy());
        let with = |change: &dyn Fn(&mut Point)| {
            let mut point = space.present().clone();
            change(&mut point);
            space.needs_restart(&space.canonical(&point).expect("a setting"))
        };
        assert!(!with(&|p| p.kind = PolicyKind::Window));
        assert!(!with(&|p| p.rows_max = 8));
        assert!(!with(&|p| p.cells_max = 256));
        assert!(with(&|p| (p.rows_max, p.cells_max) = (64, 2048)));
        assert!(with(&|p| p.cells_max = 1024));
        assert!(with(&|p| p.executors = 1));
    }

    #[test]
    fn numbers_are_those_that_people_would_write() {
        for (number, rounded) in [(0, 0), (7, 7), (12, 12), (123, 120), (1999, 2000), (98_765, 99_000)] {
            assert_eq!(round_to_two(number), rounded);
        }
    }
}
