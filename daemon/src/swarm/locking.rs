//! Keeps this manager's own keys locked on disk as long as the swarm is.

use std::sync::Arc;
use std::time::Duration;

use skep_api::{ObjectKey, SecretBytes};
use skep_manager::Manager;
use skep_pki::{KeyLock, UnlockKey};
use skep_raft_store::Commit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::active::ActiveNode;

/// In the certificates' directory; there while the keys are locked.
pub(super) const LOCK_FILE: &str = "swarm-node.lock";
/// How soon it is looked again, whatever is heard of changes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What this manager's keys are locked by.
pub(super) struct Locked {
    lock: KeyLock,
    /// The unlock key that opens the lock, as users write it.
    key: SecretBytes,
    /// Whether every key is known to be locked.
    complete: bool,
}

impl Locked {
    pub(super) const fn new(lock: KeyLock, key: SecretBytes) -> Self {
        Self { lock, key, complete: false }
    }

    pub(super) const fn lock(&self) -> &KeyLock {
        &self.lock
    }
}

impl ActiveNode {
    /// Has this manager's keys opened by `key` alone after the next start; by nothing, if that is empty.
    pub(super) async fn lock_keys(&self, key: &SecretBytes) -> anyhow::Result<()> {
        let mut locked = self.locked.lock().await;
        let file = self.certificates.join(LOCK_FILE);
        if key.is_empty() {
            if let Some(current) = locked.as_ref() {
                self.write_keys(Some(&current.lock), None)?;
                std::fs::remove_file(&file)?;
                *locked = None;
                tracing::info!("this manager's keys are not locked any more");
            }
            return Ok(());
        }
        if locked.as_ref().is_some_and(|current| current.key == *key && current.complete) {
            return Ok(());
        }
        let opens: UnlockKey = std::str::from_utf8(key.expose())?.parse()?;
        let lock = locked.as_ref().map_or_else(KeyLock::generate, |current| current.lock.clone());
        if locked.as_ref().is_none_or(|current| current.key != *key) {
            // First what opens them, so that a crash leaves nothing that does not open.
            lock.save(&file, &opens)?;
        }
        let current = locked.insert(Locked::new(lock, key.clone()));
        self.write_keys(Some(&current.lock), Some(&current.lock))?;
        current.complete = true;
        tracing::info!("this manager's keys are locked");
        Ok(())
    }

    fn write_keys(&self, before: Option<&KeyLock>, after: Option<&KeyLock>) -> anyhow::Result<()> {
        self.tls.identity().save(&self.certificates, after)?;
        if self.raft_dir().exists() {
            Manager::lock_store(&self.raft_dir(), before, after)?;
        }
        Ok(())
    }

    /// Follows what the swarm says, as long as this node is a manager.
    pub(super) async fn keep_locked(self: Arc<Self>) {
        let mut managers = self.manager.subscribe();
        loop {
            let manager = managers.borrow_and_update().clone();
            let mut commits = manager.as_ref().map(|manager| manager.store().watch());
            loop {
                let key = manager.as_ref().and_then(|manager| Some(manager.view().cluster()?.unlock_key.clone()));
                if let Some(key) = key
                    && let Err(error) = self.lock_keys(&key).await
                {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "this manager's keys could not be locked: it is tried again"
                    );
                }
                tokio::select! {
                    () = self.stop.cancelled() => return,
                    changed = managers.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    () = of_cluster(&mut commits) => {}
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
            }
        }
    }
}

/// Waits for a commit that changes the swarm's settings.
async fn of_cluster(commits: &mut Option<Receiver<Arc<Commit>>>) {
    let Some(receiver) = commits else { return std::future::pending().await };
    loop {
        match receiver.recv().await {
            Ok(commit) if commit.changes.iter().any(|change| matches!(change.key, ObjectKey::Cluster(_))) => return,
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => return,
            Err(RecvError::Closed) => return std::future::pending().await,
        }
    }
}
