//! The swarm's networks on this node: what the managers say of them goes to the overlay, and the
//! engine's containers find their places there.

use std::sync::Arc;

use skep_api::grpc;
use skep_api::{NetworkId, encoding};
use skep_engine::{Joining, KeeperReply, NetworkKeeper, PublishedPort};
use skep_overlay_net::{FactsUpdate, LocalPort, NetworkAddress, Overlay};

/// Puts the parts of a set of facts together.
#[derive(Debug, Default)]
pub(crate) struct FactsInbox(FactsUpdate);

impl FactsInbox {
    /// Takes one message; the whole update once its last part is in.
    pub(crate) fn take(&mut self, part: grpc::Facts) -> Result<Option<FactsUpdate>, encoding::DecodeError> {
        self.0.complete |= part.complete;
        self.0.revision = part.revision;
        for bytes in &part.facts {
            self.0.facts.push(encoding::decode(bytes)?);
        }
        for bytes in &part.removed {
            self.0.removed.push(encoding::decode(bytes)?);
        }
        Ok(part.last.then(|| std::mem::take(&mut self.0)))
    }
}

/// The overlay, as the engine needs it.
#[derive(Debug)]
pub struct SwarmNetworks(pub Arc<Overlay>);

impl NetworkKeeper for SwarmNetworks {
    fn join<'a>(&'a self, container: &'a str, joining: Joining) -> KeeperReply<'a, std::net::Ipv4Addr> {
        Box::pin(async move { self.0.attach(container, &convert(joining)).await })
    }

    fn adopt(&self, container: &str, joining: Joining) {
        self.0.adopt(container, &convert(joining));
    }

    fn leave<'a>(&'a self, container: &'a str) -> KeeperReply<'a, ()> {
        Box::pin(self.0.detach(container))
    }
}

fn convert(joining: Joining) -> skep_overlay_net::Joining {
    let address = |joined: &skep_engine::JoinedNetwork| {
        Some(NetworkAddress { network: joined.id.parse::<NetworkId>().ok()?, address: joined.address })
    };
    let port = |port: &PublishedPort| LocalPort {
        protocol: port.protocol,
        host_port: port.host_port,
        container_port: port.container_port,
    };
    skep_overlay_net::Joining {
        netns: joining.netns,
        addresses: joining.networks.iter().filter_map(address).collect(),
        ports: joining.ports.iter().map(port).collect(),
        resolvers: joining.resolvers.iter().filter_map(|text| text.parse().ok()).collect(),
    }
}
