//! Single containers in networks of the swarm: each has an address of its own while it runs.

use std::net::Ipv4Addr;

use skep_api_derive::Extensible;

use crate::id::{AttachmentId, NetworkId, NodeId};
use crate::object::Meta;
use crate::subnet::Subnet;

/// A node holds at most this many.
pub const PER_NODE_MAX: usize = 4096;
const NAMES_MAX: usize = 64;
const NAME_CHARS_MAX: usize = 253;

/// A single container's place in a network, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct NetworkAttachment {
    pub id: AttachmentId,
    pub meta: Meta,
    pub node: NodeId,
    /// The container's id on its node.
    pub container: String,
    pub network: NetworkId,
    pub address: Ipv4Addr,
    /// What it is called in the network, its own name first.
    pub names: Vec<String>,
}

/// A place that a node asks for; the node makes up the id, so that to ask twice is harmless.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct AttachmentWish {
    pub id: AttachmentId,
    pub container: String,
    /// The network's name or id.
    pub network: String,
    pub names: Vec<String>,
    /// Any that is free if absent.
    pub address: Option<Ipv4Addr>,
}

/// The place that was given.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct AttachmentGrant {
    pub id: AttachmentId,
    pub network: NetworkId,
    pub network_name: String,
    pub subnet: Subnet,
    pub gateway: Ipv4Addr,
    pub internal: bool,
    pub address: Ipv4Addr,
}

impl AttachmentWish {
    /// Checks all that can be known without the swarm's networks.
    pub fn validate(&self) -> Result<(), String> {
        let name_is_fine = |name: &String| !name.is_empty() && name.chars().count() <= NAME_CHARS_MAX;
        if self.container.is_empty() || self.container.len() > NAME_CHARS_MAX {
            return Err("the container's id is missing or too long".into());
        }
        if self.names.len() > NAMES_MAX || !self.names.iter().all(name_is_fine) {
            return Err(format!(
                "a container has at most {NAMES_MAX} names in a network, of 1 to {NAME_CHARS_MAX} characters"
            ));
        }
        Ok(())
    }
}
