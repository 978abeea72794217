//! The swarm's networks on this node: what the managers say of them goes to the overlay, and the
//! engine's containers find their places there.

use std::sync::Arc;

use skep_api::grpc;
use skep_api::overlay::OverlayNetwork;
use skep_api::{AttachmentId, AttachmentWish, NetworkId, encoding};
use skep_engine::{Endpoint, Grant, Joining, KeeperReply, KeptNetwork, NetworkKeeper, PublishedPort, WantedPlace};
use skep_name_server::Zone;
use skep_overlay_net::{FactsUpdate, LocalPort, NetworkAddress, Overlay};

use crate::attachments::Attachments;

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

/// The swarm's networks, as the engine needs them.
#[derive(Debug)]
pub struct SwarmNetworks {
    pub overlay: Arc<Overlay>,
    pub attachments: Attachments,
}

impl NetworkKeeper for SwarmNetworks {
    fn ask<'a>(&'a self, container: &'a str, wanted: &'a WantedPlace, names: Vec<String>) -> KeeperReply<'a, Endpoint> {
        Box::pin(async move {
            let wish = AttachmentWish {
                id: AttachmentId::random(),
                container: container.to_owned(),
                network: wanted.network.clone(),
                names: names.clone(),
                address: wanted.address,
            };
            let grant = self.attachments.ask(wish).await?;
            Ok(Endpoint {
                address_v6: None,
                network: grant.network.to_string(),
                address: Some(grant.address),
                link: 0,
                gateway_priority: 0,
                names,
                mac: None,
                grant: Some(Grant {
                    id: grant.id.to_string(),
                    network_name: grant.network_name,
                    prefix_len: grant.subnet.prefix_len(),
                    gateway: (!grant.internal).then_some(grant.gateway),
                }),
            })
        })
    }

    fn join<'a>(&'a self, container: &'a str, joining: Joining) -> KeeperReply<'a, std::net::Ipv4Addr> {
        self.hold(container, &joining);
        Box::pin(async move { self.overlay.attach(container, &convert(joining)).await })
    }

    fn adopt(&self, container: &str, joining: Joining) {
        self.hold(container, &joining);
        self.overlay.adopt(container, &convert(joining));
    }

    fn network(&self, id: &str) -> Option<KeptNetwork> {
        let OverlayNetwork { name, subnet, gateway, v6, internal, .. } = self.overlay.network(id.parse().ok()?)?;
        Some(KeptNetwork { name, subnet, gateway, v6, internal })
    }

    fn tell_names(&self, container: &str, neighbours: Zone) {
        self.overlay.tell_names(container, neighbours);
    }

    fn part<'a>(&'a self, container: &'a str, network: &'a str) -> KeeperReply<'a, ()> {
        Box::pin(async move {
            let Ok(network) = network.parse() else { return Ok(()) };
            let parted = self.overlay.part(container, network).await;
            self.attachments.release(container, Some(network));
            parted
        })
    }

    fn leave<'a>(&'a self, container: &'a str) -> KeeperReply<'a, ()> {
        Box::pin(async move {
            let left = self.overlay.detach(container).await;
            self.attachments.release(container, None);
            left
        })
    }
}

impl SwarmNetworks {
    /// Goes on wanting the places that a container was given.
    fn hold(&self, container: &str, joining: &Joining) {
        for endpoint in &joining.endpoints {
            if let Some(id) = endpoint.grant.as_ref().and_then(|grant| grant.id.parse().ok()) {
                self.attachments.want(AttachmentWish {
                    id,
                    container: container.to_owned(),
                    network: endpoint.network.clone(),
                    names: endpoint.names.clone(),
                    address: endpoint.address,
                });
            }
        }
    }
}

fn convert(joining: Joining) -> skep_overlay_net::Joining {
    let place = |at: &Endpoint| {
        Some(NetworkAddress { network: at.network.parse::<NetworkId>().ok()?, address: at.address?, link: at.link })
    };
    let port = |port: &PublishedPort| LocalPort {
        protocol: port.protocol,
        host_port: port.host_port,
        container_port: port.container_port,
        everywhere: port.host_ip.is_none_or(|address| address.is_unspecified()),
    };
    skep_overlay_net::Joining {
        netns: joining.netns,
        places: joining.endpoints.iter().filter_map(place).collect(),
        ports: joining.ports.iter().map(port).collect(),
        resolvers: joining.resolvers.iter().filter_map(|text| text.parse().ok()).collect(),
        leads_out: joining.leads_out,
        neighbours: joining.neighbours,
    }
}
