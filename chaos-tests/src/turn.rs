//! Tests on hosts take turns: the machine is small, and timing matters to them.

use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

static TURN: Mutex<()> = Mutex::new(());

/// The turn of one test; `None`, said aloud, where hosts cannot be made.
#[must_use]
pub fn turn() -> Option<MutexGuard<'static, ()>> {
    if !crate::is_root() {
        skip("this test makes namespaces and containers and needs root");
        return None;
    }
    // A test that failed in its turn has cleaned up all the same.
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Says that a test is left out, and why, also where what tests print is kept back.
pub fn skip(why: &str) {
    // Who does not listen is not told.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// Takes the test's turn, or leaves the test.
#[macro_export]
macro_rules! take_turn {
    () => {
        let Some(_turn) = $crate::turn() else { return };
    };
}
