//! OpenMetrics text, read: samples by name, with their labels. As much of the format as ferry writes.
//!
//! <https://prometheus.io/docs/specs/om/open_metrics_spec/>. Comments are passed over; a timestamp or exemplar behind a value is, too.
//!
//! Always true
//! - A page is read whole or not at all: without its `# EOF` it was cut.

use std::collections::HashMap;

/// A page of metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    by_name: HashMap<String, Vec<Sample>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    labels: Vec<(String, String)>,
    pub value: f64,
}

impl Sample {
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn has(&self, wanted: &[(&str, &str)]) -> bool {
        wanted.iter().all(|(name, value)| self.label(name) == Some(value))
    }
}

impl Metrics {
    /// Reads a page. The error names the line.
    pub fn parse(text: &str) -> Result<Metrics, String> {
        let mut metrics = Metrics::default();
        for (number, line) in text.lines().enumerate() {
            if line == "# EOF" {
                return Ok(metrics);
            }
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let sample = read_sample(line).ok_or_else(|| {
                let line: String = line.chars().take(80).collect();
                format!("metrics, line {}: expected name{{label=\"value\"}} number, got {line:?}", number + 1)
            });
            let (name, sample) = sample?;
            match metrics.by_name.get_mut(name) {
                Some(samples) => samples.push(sample),
                None => drop(metrics.by_name.insert(name.to_owned(), vec![sample])),
            }
        }
        Err("metrics: expected # EOF at the end: the page was cut".into())
    }

    /// Samples of a name that have these labels, in their order.
    pub fn of<'a>(&'a self, name: &str, labels: &'a [(&'a str, &'a str)]) -> impl Iterator<Item = &'a Sample> {
        self.by_name.get(name).into_iter().flatten().filter(|sample| sample.has(labels))
    }

    /// Their sum; 0 where there are none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.of(name, labels).map(|sample| sample.value).sum()
    }

    /// Different values of a label, in their order.
    pub fn values(&self, name: &str, label: &str) -> Vec<&str> {
        let mut values: Vec<&str> = Vec::new();
        for sample in self.by_name.get(name).into_iter().flatten() {
            if let Some(value) = sample.label(label).filter(|value| !values.contains(value)) {
                values.push(value);
            }
        }
        values
    }
}

fn read_sample(line: &str) -> Option<(&str, Sample)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            if let Some(behind) = rest.strip_prefix('}') {
                rest = behind;
                break;
            }
            let (label, behind) = rest.split_once("=\"")?;
            let (value, behind) = read_quoted(behind)?;
            labels.push((label.to_owned(), value));
            rest = behind.strip_prefix(',').unwrap_or(behind);
        }
    }
    let value = rest.strip_prefix(' ')?.split(' ').next()?;
    (!name.is_empty()).then_some((name, Sample { labels, value: value.parse().ok()? }))
}

/// What stands up to the closing quote, and what follows it.
fn read_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, next)) = chars.next() {
        match next {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            _ => value.push(next),
        }
    }
    None
}

/// Counts of a histogram by their upper bounds, ascending; not cumulative.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    counts: Vec<(f64, f64)>,
}

impl Histogram {
    /// What came between two pages; `before` is none: since the start.
    pub fn between(name: &str, labels: &[(&str, &str)], before: Option<&Metrics>, after: &Metrics) -> Histogram {
        let bucket = format!("{name}_bucket");
        let cumulative = |metrics: &Metrics| -> Vec<(f64, f64)> {
            let bound = |sample: &Sample| sample.label("le").and_then(|le| le.parse::<f64>().ok());
            let mut counts: Vec<(f64, f64)> =
                metrics.of(&bucket, labels).filter_map(|sample| Some((bound(sample)?, sample.value))).collect();
            counts.sort_by(|a, b| a.0.total_cmp(&b.0));
            counts
        };
        let earlier = before.map(cumulative).unwrap_or_default();
        // A bucket that was empty before may not have been there.
        let earlier_at =
            |bound: f64| earlier.iter().rfind(|(known, _)| *known <= bound).map_or(0.0, |(_, count)| *count);
        let mut below = 0.0;
        let counts = cumulative(after).into_iter().map(|(bound, count)| {
            let grown = (count - earlier_at(bound)).max(below);
            let own = grown - below;
            below = grown;
            (bound, own)
        });
        Histogram { counts: counts.collect() }
    }

    pub fn count(&self) -> f64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }

    /// The value below which this share lies, interpolated inside its bucket; of the last one, its lower bound. None: nothing was
    /// observed.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let count = self.count();
        let wanted = share * count;
        let (mut below, mut lower) = (0.0, 0.0);
        for (bound, own) in &self.counts {
            if *own > 0.0 && below + own >= wanted {
                return Some(if bound.is_finite() {
                    lower + (bound - lower) * ((wanted - below) / own)
                } else {
                    lower
                });
            }
            below += own;
            lower = if bound.is_finite() { *bound } else { lower };
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_with_its_labels_and_escapes() {
        let page = "# TYPE a counter\na_total{model=\"x\\\"y\\\\z\\n\",code=\"ok\"} 3\na_total{model=\"b\",code=\"ok\"} 4.5 1700\n\
                    up 1e3\n\n# EOF\n";
        let metrics = Metrics::parse(page).expect("a page");
        assert_eq!(metrics.sum("a_total", &[]), 7.5);
        assert_eq!(metrics.sum("a_total", &[("model", "x\"y\\z\n"), ("code", "ok")]), 3.0);
        assert_eq!(metrics.sum("a_total", &[("code", "lost")]), 0.0);
        assert_eq!(metrics.sum("up", &[]), 1000.0);
        assert_eq!(metrics.values("a_total", "model"), ["x\"y\\z\n", "b"]);
    }

    #[test]
    fn what_is_cut_or_no_sample_is_refused() {
        assert!(Metrics::parse("up 1\n").expect_err("cut").contains("# EOF"));
        for line in ["up", "up x", "{a=\"b\"} 1", "up{a=\"b} 1", "up{a=b} 1", "up{a=\"b\"}1"] {
            let error = Metrics::parse(&format!("fine 1\n{line}\n# EOF")).expect_err(line);
            assert!(error.starts_with("metrics, line 2: "), "{error}");
        }
    }

    fn page(buckets: &[(&str, u32)]) -> Metrics {
        let lines = buckets.iter().map(|(le, count)| format!("h_bucket{{model=\"m\",le=\"{le}\"}} {count}\n"));
        Metrics::parse(&(lines.collect::<String>() + "# EOF")).expect("a page")
    }

    #[test]
    fn quantiles_are_of_what_came_between_two_pages() {
        let before = page(&[("0.001", 100), ("0.002", 100), ("+Inf", 100)]);
        let after = page(&[("0.001", 100), ("0.002", 190), ("0.004", 198), ("+Inf", 200)]);
        let came = Histogram::between("h", &[("model", "m")], Some(&before), &after);
        assert_eq!(came.count(), 100.0);
        let close = |share: f64, expected: f64| {
            let found = came.quantile(share).expect("something came");
            assert!((found - expected).abs() < 1e-9, "{share}: {found} is not {expected}");
        };
        close(0.45, 0.0015);
        close(0.90, 0.002);
        close(0.94, 0.003);
        close(1.0, 0.004);
        let since_start = Histogram::between("h", &[("model", "m")], None, &after);
        assert_eq!(since_start.quantile(0.5), Some(0.001));
        let nothing = Histogram::between("h", &[("model", "m")], Some(&after), &after);
        assert_eq!((nothing.count(), nothing.quantile(0.5)), (0.0, None));
    }
}
