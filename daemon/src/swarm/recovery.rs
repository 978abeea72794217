//! A swarm that lost most of its managers for good goes on from one of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::active::ActiveNode;
use super::address::{advertise_addr, listen_addr};
use super::state::NodeStateFile;
use super::{BULK_PORT, InitRequest, Swarm, SwarmError, data_path, failed};

/// How long what a place of this node did may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);
const END_PAUSE: Duration = Duration::from_millis(10);

impl Swarm {
    /// Has this manager go on alone with all that it knows, after a majority of the managers was lost for good; returns
    /// its id. A node that is in no swarm makes a new one.
    pub(crate) async fn recover(&self, request: InitRequest) -> Result<String, SwarmError> {
        let one = self.change.lock().await;
        let doing = failed("recovering the swarm");
        let active = self.active.read().await.clone();
        let state = match &active {
            _ if self.is_locked() => return Err(SwarmError::Locked),
            Some(node) if !node.is_manager() => {
                return Err(SwarmError::Invalid(
                    "this node is a worker, which knows nothing of the swarm's state: recover the swarm on a manager"
                        .into(),
                ));
            }
            Some(node) => Some(node.state()),
            // As after a recovery that failed on the way: what is on the disk is not given up.
            None => NodeStateFile::load(&self.config.dir).map_err(|error| doing(&format!("{error:#}")))?,
        };
        let Some(mut state) = state else {
            drop(one);
            return self.init(request).await;
        };
        state.move_to(&request)?;
        let addr = state.advertise.clone();
        let locked = match active {
            None => None,
            Some(node) => {
                *self.active.write().await = None;
                node.stop().await;
                let locked = node.locked.lock().await.take();
                ended(node).await;
                locked
            }
        };
        if let Err(error) = self.take_up(state, locked, Some(addr)).await {
            // Its keys are closed again.
            self.is_locked.store(self.lock_file().exists(), Ordering::Relaxed);
            return Err(doing(&format!("{error:#}")));
        }
        let node = self.node().await?;
        let manager = self.manager().await?;
        node.await_ready(&manager).await;
        tracing::warn!(node = %node.id(), "the swarm was recovered by this manager alone");
        Ok(node.id().to_string())
    }
}

impl NodeStateFile {
    /// Has the node be where the request says, alone; what it does not say stays.
    fn move_to(&mut self, request: &InitRequest) -> Result<(), SwarmError> {
        if !request.listen.is_empty() {
            self.listen = listen_addr(&request.listen)?;
        }
        // A node that was seen at whatever address it came from is to name one now.
        if !request.advertise.is_empty() || self.advertise.parse::<SocketAddr>().is_err() {
            self.advertise = advertise_addr(&request.advertise, self.listen)?;
        }
        if !request.data_path_addr.is_empty() {
            self.data_path_addr = data_path(&request.data_path_addr, self.data_path_port)?.0;
        }
        self.managers = vec![self.advertise.clone()];
        Ok(())
    }
}

/// Waits until what a node's place did has come to its end, and given back the port of bulk traffic, which it does last.
async fn ended(node: Arc<ActiveNode>) {
    let addr = SocketAddr::new(node.state().listen.ip(), BULK_PORT);
    drop(node);
    let port_is_back = async {
        while std::net::UdpSocket::bind(addr).is_err() {
            tokio::time::sleep(END_PAUSE).await;
        }
    };
    if tokio::time::timeout(END_LIMIT, port_is_back).await.is_err() {
        tracing::warn!(%addr, "something of this node's place in the swarm goes on");
    }
}
