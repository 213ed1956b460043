//! What each tenant had of the batches.
//!
//! Always true
//! - Callers choose the names of tenants, so only the first [`TENANTS_LABELLED_MAX`] that greet the server have a label of their
//!   own; the rest, and the nameless, are counted together.
//! - Written by the batcher alone, once for each run of rows of one tenant in a batch.

use std::sync::OnceLock;

use super::OTHER;
use super::counters::Count;

/// Tenants with a label of their own.
pub const TENANTS_LABELLED_MAX: usize = 32;

#[derive(Debug)]
struct Tenant {
    name: OnceLock<String>,
    requests: Count,
    cells: Count,
}

/// By the number of a tenant; the first is for all without a label.
#[derive(Debug)]
pub struct TenantMetrics(Vec<Tenant>);

impl Default for TenantMetrics {
    fn default() -> TenantMetrics {
        let tenant = |_| Tenant { name: OnceLock::new(), requests: Count::default(), cells: Count::default() };
        TenantMetrics((0..=TENANTS_LABELLED_MAX).map(tenant).collect())
    }
}

impl TenantMetrics {
    fn of(&self, number: u16) -> &Tenant {
        self.0.get(usize::from(number)).unwrap_or(&self.0[0])
    }

    /// A tenant of this number greeted the server.
    pub fn seen(&self, number: u16, name: &str) {
        if number > 0 && usize::from(number) <= TENANTS_LABELLED_MAX {
            let _ = self.0[usize::from(number)].name.set(name.to_owned());
        }
    }

    /// So many requests of a tenant, with so many cells of their own, left in a batch.
    pub fn served(&self, number: u16, requests: u64, cells: u64) {
        let tenant = self.of(number);
        tenant.requests.add(requests);
        tenant.cells.add(cells);
    }

    /// Name, requests and cells of those who had any.
    pub(super) fn served_so_far(&self) -> Vec<(&str, u64, u64)> {
        let mut all: Vec<(&str, u64, u64)> = Vec::new();
        for tenant in &self.0 {
            let (requests, cells) = (tenant.requests.get(), tenant.cells.get());
            let name = tenant.name.get().map_or(OTHER, String::as_str);
            match all.iter_mut().find(|known| known.0 == name) {
                // One that calls itself so.
                Some(known) => (known.1, known.2) = (known.1 + requests, known.2 + cells),
                None => all.push((name, requests, cells)),
            }
        }
        all.retain(|(_, requests, _)| *requests > 0);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_tenants_have_labels_and_no_name_makes_a_second_series() {
        let tenants = TenantMetrics::default();
        tenants.seen(1, "a");
        tenants.seen(2, OTHER);
        tenants.seen(900, "too late");
        tenants.served(0, 1, 10);
        tenants.served(1, 2, 20);
        tenants.served(2, 3, 30);
        tenants.served(900, 4, 40);
        assert_eq!(tenants.served_so_far(), [(OTHER, 8, 80), ("a", 2, 20)]);
    }
}
