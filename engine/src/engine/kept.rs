//! Containers in networks that somebody else keeps: the swarm's.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use super::networks::{member, places};
use super::{Container, Engine, EngineError, disk_error};
use crate::container::config::{JoinedNetwork, NetworkMode, PublishedPort};
use crate::container::state::ContainerState;
use crate::network::{Endpoint, Joining, KeptNetwork, Member, NetworkKeeper, WantedPlace};

/// Places that were planned with the container, as its endpoints.
pub(super) fn planned(networks: &[JoinedNetwork]) -> Vec<Endpoint> {
    let endpoint = |(link, joined): (u32, &JoinedNetwork)| Endpoint {
        network: joined.id.clone(),
        address: Some(joined.address),
        address_v6: None,
        link,
        gateway_priority: 0,
        names: Vec::new(),
        mac: None,
        grant: None,
    };
    (0..).zip(networks).map(endpoint).collect()
}

impl Engine {
    /// Names who keeps the networks that are not this host's alone, and tells it of the containers
    /// that are in them already.
    pub fn set_network_keeper(&self, keeper: Option<Arc<dyn NetworkKeeper>>) {
        if let Some(keeper) = &keeper {
            for container in self.lock().values() {
                let ContainerState::Running(running) = &*container.state.borrow() else { continue };
                let config = container.config();
                let endpoints = match &config.network {
                    NetworkMode::Joined(networks) => planned(networks),
                    _ => running.endpoints.iter().filter(|endpoint| endpoint.grant.is_some()).cloned().collect(),
                };
                if !endpoints.is_empty() {
                    let member = member(container, &config);
                    keeper.adopt(&container.id, self.joining(&member, endpoints, running.ports.clone()));
                }
            }
        }
        self.networks.set_keeper(keeper);
    }

    /// A network that somebody else keeps, as far as it is known here.
    #[must_use]
    pub fn kept_network(&self, id: &str) -> Option<KeptNetwork> {
        self.networks.keeper()?.network(id)
    }

    /// Who keeps the networks that are not this host's alone; an error if nobody does.
    pub(super) fn keeper(&self) -> io::Result<Arc<dyn NetworkKeeper>> {
        self.networks.keeper().ok_or_else(|| {
            io::Error::other("this host is in no swarm: join the swarm again, or take the container off its networks")
        })
    }

    /// Takes all containers out of the networks that somebody else kept, who keeps them no more.
    pub async fn leave_kept_networks(&self) {
        let containers: Vec<_> = self.lock().values().cloned().collect();
        for container in containers {
            if let Err(error) = self.leave_kept(&container).await {
                tracing::warn!(container = container.id, %error, "a container still has places in the swarm's networks");
            }
        }
    }

    async fn leave_kept(&self, container: &Arc<Container>) -> Result<(), EngineError> {
        let _one = container.operation.lock().await;
        let config = container.config();
        let all = places(&config.network).unwrap_or_default().into_iter();
        let (kept, own): (Vec<_>, Vec<_>) = all.partition(|place| place.kept);
        if kept.is_empty() {
            return Ok(());
        }
        let doing = || disk_error(format!("taking container {} off the swarm's networks", config.name));
        for place in &kept {
            self.networks.part(&container.id, &place.network).await.map_err(doing())?;
        }
        container.change_endpoints(|endpoints| endpoints.retain(|endpoint| endpoint.grant.is_none()));
        self.settle_kept(container, &member(container, &config)).await.map_err(doing())?;
        self.keep_places(container, own)
    }

    /// Asks for those of a container's places that somebody else keeps.
    pub(super) async fn ask_keeper(&self, member: &Member<'_>, places: &[WantedPlace]) -> io::Result<Vec<Endpoint>> {
        let mut granted = Vec::new();
        for place in places.iter().filter(|place| place.kept) {
            let names = member.names.iter().chain(&place.aliases).cloned().collect();
            granted.push(self.keeper()?.ask(member.id, place, names).await?);
        }
        Ok(granted)
    }

    /// Joins a container to those of its networks that somebody else keeps, and leads its ports there if
    /// it has no other way out; returns what they lead through.
    pub(super) async fn join_kept(
        &self,
        member: &Member<'_>,
        endpoints: &[Endpoint],
        ports: &[PublishedPort],
    ) -> io::Result<Option<Ipv4Addr>> {
        let own = |endpoint: &Endpoint| self.networks.get(&endpoint.network).is_some();
        let kept: Vec<Endpoint> = endpoints.iter().filter(|endpoint| !own(endpoint)).cloned().collect();
        let through = if kept.is_empty() {
            None
        } else {
            // From now on its names are the keeper's to serve.
            self.networks.serve_names().await;
            let joining = self.joining(member, kept, ports.to_vec());
            let leads_out = joining.leads_out;
            Some(self.keeper()?.join(member.id, joining).await?).filter(|_| leads_out)
        };
        self.networks.lead(member.id, through).await?;
        Ok(through)
    }

    fn joining(&self, member: &Member<'_>, endpoints: Vec<Endpoint>, ports: Vec<PublishedPort>) -> Joining {
        let leads_out = !self.networks.lets_out(member.id);
        Joining {
            netns: self.networks.netns_path(member.id),
            endpoints,
            // Those of the host that lead to a place of its own need nobody else.
            ports: if leads_out { ports } else { Vec::new() },
            resolvers: member.resolvers.to_vec(),
            leads_out,
            neighbours: self.networks.neighbours(member.id),
        }
    }
}
