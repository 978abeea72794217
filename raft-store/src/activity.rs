//! What a store has done since it was opened, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters the log keeps while it works.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    entries: AtomicU64,
    flushes: AtomicU64,
}

/// What a store has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActivityCounts {
    /// Entries appended to the log on disk.
    pub entries: u64,
    /// Times the disk was told to keep what was written; one serves many entries.
    pub flushes: u64,
}

impl Activity {
    pub(crate) fn count_entries(&self, count: u64) {
        self.entries.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn count_flush(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> ActivityCounts {
        ActivityCounts { entries: self.entries.load(Ordering::Relaxed), flushes: self.flushes.load(Ordering::Relaxed) }
    }
}
