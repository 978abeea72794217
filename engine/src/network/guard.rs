//! Puts the rules of networks back when somebody has taken them away, as the reload of a firewall does.

use std::io;
use std::sync::Weak;
use std::time::Duration;

use super::lease::Lease;
use super::ruleset::TABLE;
use super::{Networks, v6};
use crate::sys;

/// How long a firewall is given to do all that it does at once.
const SETTLED: Duration = Duration::from_millis(300);

/// Watches over the rules as long as `networks` finds any.
pub(crate) async fn guard<T: Send + Sync + 'static>(owner: Weak<T>, networks: fn(&T) -> &Networks) {
    let watched = skep_host_net::changes().and_then(sys::watch_fd);
    let changes = match watched {
        Ok(changes) => changes,
        Err(error) => {
            tracing::warn!(%error, "rules that somebody else takes away will not be put back");
            return;
        }
    };
    while let Ok(mut ready) = changes.readable().await {
        tokio::time::sleep(SETTLED).await;
        skep_host_net::drain_changes(changes.get_ref());
        ready.clear_ready();
        let Some(owner) = owner.upgrade() else { return };
        match networks(&owner).put_back().await {
            Ok(true) => tracing::warn!("the rules of this host's networks were taken away, and are back"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the rules of this host's networks cannot be put back"),
        }
    }
}

impl Networks {
    /// Writes the rules if there are to be some and are none.
    async fn put_back(&self) -> io::Result<bool> {
        // A daemon that has just begun has found containers, and made no bridge yet; those in others' networks alone
        // need no rules.
        let needs_rules = |lease: &Lease| !lease.places.is_empty() || !lease.ports.is_empty();
        if !self.leases().values().any(needs_rules) && self.indexes.lock().await.is_empty() {
            return Ok(false);
        }
        let with_v6 = self.all().values().any(|network| network.v6.is_some());
        let look = move || {
            Ok::<_, io::Error>(skep_host_net::has_table(TABLE)? && (!with_v6 || skep_host_net::has_table(v6::TABLE)?))
        };
        let there = tokio::task::spawn_blocking(look).await.map_err(io::Error::other)??;
        if !there {
            self.write_rules().await?;
        }
        Ok(!there)
    }
}
