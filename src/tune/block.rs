//! A policy as the `[batching]` block of a manifest, and how two of them differ.
//!
//! Always true
//! - A manifest with the block of a policy has that policy, as far as a manifest can say it: budgets, window, buckets, layout, weight,
//!   slo. What only `ferry set` knows (`hold`, `class_worth`, …) is not in a block.
//!
//! Elsewhere: what a manifest takes (models/manifest.rs).

use crate::scheduler::{Buckets, Edges, PadTo, Policy, PolicyKind};

/// Keys with their values as TOML, in the order in which they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block(pub Vec<(&'static str, String)>);

/// A line of a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    Same(String),
    Old(String),
    New(String),
}

impl Line {
    /// As unified differences mark it.
    pub fn sign(&self) -> char {
        match self {
            Line::Same(_) => ' ',
            Line::Old(_) => '-',
            Line::New(_) => '+',
        }
    }

    pub fn text(&self) -> &str {
        match self {
            Line::Same(text) | Line::Old(text) | Line::New(text) => text,
        }
    }
}

impl Block {
    /// `cells_auto`: the budget is what the warm-up finds, and this policy has it.
    pub fn of(policy: &Policy, cells_auto: bool) -> Block {
        let mut lines: Vec<(&'static str, String)> = Vec::new();
        let mut add = |key, value: String| lines.push((key, value));
        let quoted = |word: &str| format!("\"{word}\"");
        add("policy", quoted(policy.kind.name()));
        add("rows_max", policy.rows_max.to_string());
        let possible = u64::from(policy.rows_max) * u64::from(policy.buckets.longest());
        let cells = if cells_auto { quoted("auto") } else { policy.cells_max.min(possible).to_string() };
        add("padded_cells_max", cells);
        if let Some(delay) = policy.queue_delay_max {
            // A manifest has whole microseconds.
            add("queue_delay_max_us", delay.as_nanos().div_ceil(1000).to_string());
        }
        if policy.can_pack {
            add("layout", quoted(policy.layout.name()));
        }
        let pad_to = match policy.pad_to {
            PadTo::Bucket => "bucket",
            PadTo::Longest => "longest",
        };
        add("pad_to", quoted(pad_to));
        let longest = policy.buckets.longest();
        if policy.edges == Edges::Auto {
            add("buckets", quoted("auto"));
            add("shapes_max", policy.shapes_max.to_string());
        } else if policy.buckets != Buckets::geometric(longest) {
            let lens: Vec<String> = policy.buckets.lens().iter().map(u32::to_string).collect();
            add("buckets", format!("[{}]", lens.join(", ")));
        }
        if policy.kind == PolicyKind::Buckets || policy.fill_waste_max != 0.25 {
            add("fill_waste_max", policy.fill_waste_max.to_string());
        }
        if policy.weight != 1.0 {
            add("weight", policy.weight.to_string());
        }
        if policy.slo != Policy::SLO {
            add("slo_ms", (policy.slo.as_nanos() as f64 / 1e6).to_string());
        }
        Block(lines)
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| *other == key).map(|(_, value)| value.as_str())
    }

    /// From this block to the other.
    pub fn diff(&self, other: &Block) -> Vec<Line> {
        let line = |key: &str, value: &str| format!("{key} = {value}");
        let mut lines = vec![Line::Same("[batching]".to_owned())];
        for (key, value) in &self.0 {
            match other.get(key) {
                Some(new) if new == value => lines.push(Line::Same(line(key, value))),
                Some(new) => lines.extend([Line::Old(line(key, value)), Line::New(line(key, new))]),
                None => lines.push(Line::Old(line(key, value))),
            }
        }
        let added = other.0.iter().filter(|(key, _)| self.get(key).is_none());
        lines.extend(added.map(|(key, value)| Line::New(line(key, value))));
        lines
    }
}

/// What the difference leads to: a block as text.
pub fn after(lines: &[Line]) -> String {
    let kept = lines.iter().filter(|line| !matches!(line, Line::Old(_)));
    kept.map(|line| format!("{}\n", line.text())).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::models::manifest::Manifest;
    use crate::scheduler::QueueLimits;
    use crate::server::policy_of;
    use crate::tune::space::tests::{policy, space};
    use crate::vocab::Layout;

    /// The policy of a manifest with this block.
    fn parsed(block: &str, policy: &Policy) -> Policy {
        let longest = policy.buckets.longest();
        let text = format!(
            "architecture = \"echo\"\nversion = \"1\"\n[dims.tokens]\nmin = 1\nmax = {longest}\n[[input]]\nname = \"a\"\n\
             dtype = \"f32\"\nshape = [\"tokens\"]\n[[output]]\nname = \"a\"\ndtype = \"f32\"\nshape = [\"tokens\"]\n{block}"
        );
        let manifest = Manifest::parse("m", Path::new("m"), &text).unwrap_or_else(|error| panic!("{error}: {block}"));
        let layouts: &[Layout] = if policy.can_pack { &[Layout::Padded, Layout::Packed] } else { &[Layout::Padded] };
        policy_of(&manifest, layouts)
    }

    #[test]
    fn the_new_side_of_a_difference_is_a_block_that_a_manifest_takes_and_means_the_policy() {
        let mut compared = 0;
        for present in [
            policy(),
            Policy { can_pack: false, layout: Layout::Padded, kind: PolicyKind::Buckets, weight: 2.5, ..policy() },
            Policy {
                edges: Edges::Auto,
                shapes_max: 5,
                buckets: crate::scheduler::edges::prior_edges(256, 5),
                slo: std::time::Duration::from_micros(12_500),
                ..policy()
            },
            Policy { buckets: Buckets::geometric(256), pad_to: PadTo::Longest, fill_waste_max: 0.12, ..policy() },
        ] {
            let space = space(present.clone());
            let old = Block::of(&present, false);
            let grid = space.grid();
            let around = grid.iter().step_by(9).flat_map(|point| space.neighbours(point, 1.3));
            for point in grid.iter().cloned().chain(around) {
                let wanted = space.policy(&point).expect("a point has a policy");
                let block = after(&old.diff(&Block::of(&wanted, false)));
                let found = parsed(&block, &wanted);
                // How many there may be where they are automatic says nothing of those that are given.
                let shapes_max = |policy: &Policy| if policy.edges == Edges::Auto { policy.shapes_max } else { 0 };
                let plain =
                    |policy: Policy| Policy { queue: QueueLimits::NONE, shapes_max: shapes_max(&policy), ..policy };
                // Beyond what batches can have, a budget means nothing.
                let most = u64::from(wanted.rows_max) * 256;
                let wanted = Policy { cells_max: wanted.cells_max.min(most), ..wanted };
                assert_eq!(plain(found), plain(wanted), "{block}");
                compared += 1;
            }
        }
        assert!(compared > 500, "{compared}");
    }

    #[test]
    fn a_difference_names_what_goes_and_what_comes() {
        let old = Policy { queue_delay_max: Some(std::time::Duration::from_nanos(1_500_001)), ..policy() };
        let new = Policy { kind: PolicyKind::Window, queue_delay_max: None, fill_waste_max: 0.5, ..old.clone() };
        let lines: Vec<String> = Block::of(&old, true)
            .diff(&Block::of(&new, true))
            .iter()
            .map(|line| format!("{}{}", line.sign(), line.text()))
            .collect();
        let expected = [
            " [batching]",
            "-policy = \"cost\"",
            "+policy = \"window\"",
            " rows_max = 32",
            " padded_cells_max = \"auto\"",
            "-queue_delay_max_us = 1501",
            " layout = \"packed\"",
            " pad_to = \"bucket\"",
            " buckets = [16, 64, 256]",
            "+fill_waste_max = 0.5",
        ];
        assert_eq!(lines, expected);
    }
}
