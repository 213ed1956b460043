//! Any bytes as a saved scheduler, a saved policy, or what was learned of a model.
//!
//! Fails on a panic: a file that was damaged, or written by another version, is an error. What is taken can be saved again.
#![no_main]

use ferry::scheduler::Scheduler;
use ferry::scheduler::state::{LAYOUT, restore_policy, save_policy};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Ok(scheduler) = Scheduler::restore(LAYOUT, input) {
        let again = scheduler.save().expect("it came from so few bytes");
        assert!(Scheduler::restore(LAYOUT, &again).is_ok());
        let _ = scheduler.audit();
    }
    if let Ok(policy) = restore_policy(LAYOUT, input) {
        assert!(restore_policy(LAYOUT, &save_policy(&policy)).is_ok());
    }
});
