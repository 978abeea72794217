//! Gathers what the runners say and hands it to the session in batches; repeats it in the next
//! session until a manager has it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use skep_api::grpc::{StatusBatch, TaskStatusUpdate};
use skep_api::{TaskId, TaskStatus, encoding};
use tokio::sync::Notify;

/// Statuses in one batch, as the protocol allows.
const BATCH_MAX: usize = 1000;

/// The newest status of each task, and which were not sent yet.
#[derive(Clone, Default)]
pub(crate) struct Reporter(Arc<Inner>);

#[derive(Default)]
struct Inner {
    held: Mutex<Held>,
    news: Notify,
}

#[derive(Default)]
struct Held {
    newest: BTreeMap<TaskId, TaskStatus>,
    unsent: BTreeMap<TaskId, TaskStatus>,
}

impl Reporter {
    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.held.lock().expect("nobody panics while holding it")
    }

    pub(crate) fn report(&self, id: TaskId, status: TaskStatus) {
        let mut held = self.lock();
        held.newest.insert(id, status.clone());
        held.unsent.insert(id, status);
        drop(held);
        self.0.news.notify_one();
    }

    pub(crate) fn forget(&self, id: TaskId) {
        let mut held = self.lock();
        held.newest.remove(&id);
        held.unsent.remove(&id);
    }

    /// A new session: what the last one was told may never have been written.
    pub(crate) fn begin_session(&self) {
        let mut held = self.lock();
        held.unsent = held.newest.clone();
        drop(held);
        self.0.news.notify_one();
    }

    /// Waits until there is something to say.
    pub(crate) async fn next_batch(&self) -> StatusBatch {
        loop {
            {
                let mut held = self.lock();
                let ids: Vec<TaskId> = held.unsent.keys().take(BATCH_MAX).copied().collect();
                if !ids.is_empty() {
                    let update = |id: &TaskId, status: &TaskStatus| TaskStatusUpdate {
                        task_id: id.to_bytes().to_vec(),
                        status: encoding::encode(status),
                    };
                    let updates = ids.iter().filter_map(|id| held.unsent.remove(id).map(|s| update(id, &s)));
                    return StatusBatch { updates: updates.collect() };
                }
            }
            self.0.news.notified().await;
        }
    }
}
