//! What this machine gives the process: cores, open files, memory. Defaults follow from it.
//!
//! Elsewhere: what the front-end needs of the machine to run at all (frontend/preflight.rs).

use nix::sys::resource::{Resource, getrlimit};

/// What defaults are derived from. Read once, so that a test can say which machine it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Physical ones that this process may use.
    pub cores: usize,
    /// Soft limit of open files.
    pub nofile: u64,
    /// Bytes of memory, or of the container's or unit's share of it. `u64::MAX` where the system does not say.
    pub memory: u64,
}

impl Machine {
    pub fn here() -> Machine {
        // What this process may use, and no more than there are cores: a second thread of a core computes nothing faster.
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        let cores = allowed.min(num_cpus::get_physical()).max(1);
        let nofile = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _hard)| soft);
        let memory = memory_bytes(&|path| std::fs::read_to_string(path).ok()).unwrap_or(u64::MAX);
        Machine { cores, nofile, memory }
    }
}

/// The least of the machine's memory and of what the control groups around this process may hold, of either version. `read` gives
/// the text of a file.
///
/// The name of a group may be the host's while its files lie at the root, as in a container without a namespace of its own, so
/// that the groups above it are asked as well; each bounds those below it.
pub fn memory_bytes(read: &dyn Fn(&str) -> Option<String>) -> Option<u64> {
    let total = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    });
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        // hierarchy:controllers:name (cgroups(7)).
        let mut parts = line.splitn(3, ':');
        let (hierarchy, controllers, name) = (parts.next()?, parts.next()?, parts.next()?);
        let (root, file) = if controllers.split(',').any(|controller| controller == "memory") {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else if hierarchy == "0" && controllers.is_empty() {
            ("/sys/fs/cgroup", "memory.max")
        } else {
            return None;
        };
        let depths = name.match_indices('/').map(|(at, _)| at).chain([name.len()]);
        // A group that says "max" has no limit of its own.
        depths.filter_map(|depth| read(&format!("{root}{}/{file}", &name[..depth]))?.trim().parse::<u64>().ok()).min()
    });
    limits.chain(total).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory(files: &[(&str, &str)]) -> Option<u64> {
        memory_bytes(&|path| files.iter().find(|(name, _)| *name == path).map(|(_, text)| (*text).to_owned()))
    }

    #[test]
    fn the_least_of_the_machine_and_of_all_groups_around_counts() {
        let machine = ("/proc/meminfo", "MemTotal:        2097152 kB\nMemFree: 1 kB\n");
        let two = ("/proc/self/cgroup", "0::/system.slice/ferry.service\n");
        assert_eq!(memory(&[machine]), Some(2048 * MIB));
        assert_eq!(memory(&[machine, two]), Some(2048 * MIB), "no file, no limit");
        let own = ("/sys/fs/cgroup/system.slice/ferry.service/memory.max", "1073741824\n");
        assert_eq!(memory(&[machine, two, own]), Some(1024 * MIB));
        let above = ("/sys/fs/cgroup/system.slice/memory.max", "536870912\n");
        assert_eq!(memory(&[machine, two, own, above]), Some(512 * MIB));
        let unlimited = ("/sys/fs/cgroup/system.slice/ferry.service/memory.max", "max\n");
        assert_eq!(memory(&[machine, two, unlimited]), Some(2048 * MIB));
        assert_eq!(memory(&[two, unlimited]), None);
        // A namespace of its own: the group is the root.
        let root = [("/proc/self/cgroup", "0::/\n"), ("/sys/fs/cgroup/memory.max", "1048576")];
        assert_eq!(memory(&root), Some(MIB));
    }

    #[test]
    fn version_one_has_a_hierarchy_for_memory_alone_or_with_others() {
        let machine = ("/proc/meminfo", "MemTotal: 2097152 kB");
        for controllers in ["memory", "cpu,memory"] {
            let groups = format!("9:name=systemd:/\n4:{controllers}:/docker/abc\n1:cpu:/x\n0::/\n");
            let groups = ("/proc/self/cgroup", groups.as_str());
            let none = ("/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n");
            assert_eq!(memory(&[machine, groups, none]), Some(2048 * MIB));
            let root = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "268435456\n");
            assert_eq!(memory(&[machine, groups, none, root]), Some(256 * MIB));
        }
        let other = [machine, ("/proc/self/cgroup", "1:cpu:/x\n"), ("/sys/fs/cgroup/memory.max", "1")];
        assert_eq!(memory(&other), Some(2048 * MIB), "no group of memory");
    }

    #[test]
    fn of_this_machine_something_is_known() {
        let Machine { cores, nofile, memory } = Machine::here();
        assert!(cores >= 1 && nofile >= 1 && (MIB..1 << 50).contains(&memory), "{cores} {nofile} {memory}");
    }
}
