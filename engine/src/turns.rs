//! Turns at things that have names: one at a time for each of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::OwnedMutexGuard;

/// A turn, until it is dropped.
pub(crate) type Turn = OwnedMutexGuard<()>;

/// Who has a turn at what. A name that nobody waits for costs nothing.
#[derive(Default)]
pub(crate) struct Turns(Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    fn of(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.lock().expect("nobody panics while holding it");
        turns.retain(|_, turn| turn.strong_count() > 0);
        turns.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
            let turn = Arc::default();
            turns.insert(name.to_owned(), Arc::downgrade(&turn));
            turn
        })
    }

    /// Waits for a turn.
    pub(crate) async fn take(&self, name: &str) -> Turn {
        self.of(name).lock_owned().await
    }

    /// A turn, if nobody has it.
    pub(crate) fn try_take(&self, name: &str) -> Option<Turn> {
        self.of(name).try_lock_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_are_had_one_at_a_time() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        assert!(turns.try_take("a").is_none() && turns.try_take("b").is_some());
        drop(first);
        assert!(turns.try_take("a").is_some());
    }
}
