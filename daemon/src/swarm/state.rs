//! What a node remembers of its swarm beside its certificate.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use skep_api::NodeId;

const FILE: &str = "state.json";
/// A file of a newer kind is refused rather than misread.
const FORMAT: u32 = 1;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeStateFile {
    format: u32,
    pub(crate) node: NodeId,
    pub(crate) listen: SocketAddr,
    /// `host:port`, or `:port` for "as I am seen".
    pub(crate) advertise: String,
    pub(crate) managers: Vec<String>,
    /// The number in consensus; made anew at each promotion.
    pub(crate) raft_id: u64,
    /// Whether consensus has taken this node in.
    pub(crate) in_raft: bool,
}

impl NodeStateFile {
    pub(crate) fn new(node: NodeId, listen: SocketAddr, advertise: &str, managers: Vec<String>) -> Self {
        let advertise = advertise.to_owned();
        Self { format: FORMAT, node, listen, advertise, managers, raft_id: rand::random(), in_raft: false }
    }

    pub(crate) fn load(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join(FILE);
        match std::fs::read(&path) {
            Ok(bytes) => {
                let state: Self = serde_json::from_slice(&bytes)
                    .map_err(|error| anyhow::anyhow!("{} is damaged: {error}", path.display()))?;
                anyhow::ensure!(
                    state.format <= FORMAT,
                    "{} has format {}, this version of skep reads up to {FORMAT}: upgrade skep on this node",
                    path.display(),
                    state.format
                );
                Ok(Some(state))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(anyhow::anyhow!("{} cannot be read: {error}", path.display())),
        }
    }

    pub(crate) fn save(&self, dir: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let new = dir.join("state.new");
        let mut file = std::fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_data()?;
        std::fs::rename(&new, dir.join(FILE))
    }
}
