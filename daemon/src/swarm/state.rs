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
    /// Where other nodes reach this one's tunnels; empty: where it is advertised, or seen.
    #[serde(default)]
    pub(crate) data_path_addr: String,
    pub(crate) data_path_port: u16,
}

impl NodeStateFile {
    pub(crate) fn new(
        node: NodeId,
        listen: SocketAddr,
        advertise: &str,
        managers: Vec<String>,
        (data_path_addr, data_path_port): (String, u16),
    ) -> Self {
        Self {
            format: FORMAT,
            node,
            listen,
            advertise: advertise.to_owned(),
            managers,
            raft_id: rand::random(),
            in_raft: false,
            data_path_addr,
            data_path_port,
        }
    }

    /// The address that other nodes reach this one's tunnels at; empty: where its session comes from.
    pub(crate) fn tunnel_addr(&self) -> String {
        if !self.data_path_addr.is_empty() {
            return self.data_path_addr.clone();
        }
        self.advertise.parse::<SocketAddr>().map_or_else(|_| String::new(), |addr| addr.ip().to_string())
    }

    pub(crate) fn load(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join(FILE);
        match std::fs::read(&path) {
            Ok(bytes) => {
                let damaged = |error| anyhow::anyhow!("{} is damaged: {error}", path.display());
                let state: serde_json::Value = serde_json::from_slice(&bytes).map_err(damaged)?;
                // First: a newer one may have other members.
                let format = state["format"].as_u64().unwrap_or(0);
                anyhow::ensure!(
                    format <= FORMAT.into(),
                    "{} has format {format}, this version of skep reads up to {FORMAT}: upgrade skep on this node",
                    path.display()
                );
                serde_json::from_value(state).map(Some).map_err(damaged)
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
