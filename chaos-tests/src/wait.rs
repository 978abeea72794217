//! Waiting for a state, with a deadline, telling on failure what was last seen.

use std::time::{Duration, Instant};

/// Longer than anything here should take.
pub const LIMIT: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks again and again until `look` finds what is waited for; `Err` says what it saw instead.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if Instant::now() >= deadline => panic!("{what}: not within {limit:?}; last seen: {seen}"),
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// The same for a condition, with a text that says what is seen.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut look: impl FnMut() -> (bool, String)) {
    wait_for(what, limit, || {
        let (reached, seen) = look();
        if reached { Ok(()) } else { Err(seen) }
    });
}
