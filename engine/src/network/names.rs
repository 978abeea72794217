//! What containers are called in the host's networks, and who is told.

use std::collections::BTreeMap;

use skep_name_server::{Served, Zone};

use super::lease::Lease;
use super::{LocalNetwork, Networks};

impl Networks {
    /// The names that a container sees in the host's networks.
    pub(crate) fn neighbours(&self, container: &str) -> Zone {
        let (all, leases) = (self.all(), self.leases());
        let zones = zones(&all, &leases);
        let mut seen = self.links().get(container).map(|links| linked(links, &zones)).unwrap_or_default();
        for place in leases.get(container).into_iter().flat_map(|lease| &lease.places) {
            let Some(zone) = zones.get(&place.network) else { continue };
            for (name, addresses) in &zone.names {
                seen.names.entry(name.clone()).or_insert_with(|| addresses.clone());
            }
            seen.reverse.extend(zone.reverse.clone());
            for (name, addresses) in &zone.names_v6 {
                seen.names_v6.entry(name.clone()).or_insert_with(|| addresses.clone());
            }
            seen.reverse_v6.extend(zone.reverse_v6.clone());
        }
        seen
    }

    /// Brings the names that containers are served in line with who is where.
    pub(crate) async fn serve_names(&self) {
        let (zones, served) = {
            let (all, leases) = (self.all(), self.leases());
            let resolvers = self.resolvers.lock().expect("nobody panics while holding it");
            let (mut zones, links) = (zones(&all, &leases), self.links());
            let own: Vec<_> = links.iter().map(|(id, links)| (links_of(id), linked(links, &zones))).collect();
            zones.extend(own);
            (zones, self.served(&all, &leases, &resolvers))
        };
        for (container, error) in self.names.lock().await.update(&zones, &served).await {
            tracing::warn!(container, %error, "names cannot be served");
        }
        if let Some(keeper) = self.keeper() {
            for container in self.served_by_keeper() {
                keeper.tell_names(&container, self.neighbours(&container));
            }
        }
    }

    fn links(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Links>> {
        self.links.lock().expect("nobody panics while holding it")
    }

    /// The containers whose names somebody else serves, as they are in networks of theirs, too.
    fn served_by_keeper(&self) -> Vec<String> {
        let (all, leases) = (self.all(), self.leases());
        leases.iter().filter(|(_, lease)| lease.is_kept(&all)).map(|(id, _)| id.clone()).collect()
    }

    fn served(
        &self,
        all: &BTreeMap<String, LocalNetwork>,
        leases: &BTreeMap<String, Lease>,
        resolvers: &BTreeMap<String, Vec<String>>,
    ) -> BTreeMap<String, Served<String>> {
        let mut served = BTreeMap::new();
        for (id, lease) in leases {
            let networks: Vec<&LocalNetwork> =
                lease.places.iter().filter_map(|place| all.get(&place.network)).collect();
            if lease.is_kept(all) || !networks.iter().any(|network| network.has_names()) {
                continue;
            }
            let own = resolvers.get(id).into_iter().flatten().filter_map(|text| text.parse().ok());
            served.insert(
                id.clone(),
                Served {
                    netns: self.netns_path(id),
                    // What it calls others itself comes first.
                    networks: std::iter::once(links_of(id))
                        .chain(networks.iter().filter(|n| n.has_names()).map(|n| n.id.clone()))
                        .collect(),
                    forward: networks.iter().any(|network| !network.internal),
                    resolvers: own.collect(),
                },
            );
        }
        served
    }
}

/// What a container calls others, network by network: names by aliases.
pub(super) type Links = BTreeMap<String, BTreeMap<String, String>>;

/// The zone of what one container alone calls others; no network is called so.
fn links_of(container: &str) -> String {
    format!("links of {container}")
}

/// What links come to, as far as those are there that they lead to.
fn linked(links: &Links, zones: &BTreeMap<String, Zone>) -> Zone {
    let mut own = Zone::default();
    for (network, links) in links {
        let Some(zone) = zones.get(network) else { continue };
        for (alias, name) in links {
            let (alias, name) = (alias.to_lowercase(), name.to_lowercase());
            own.names.extend(zone.names.get(&name).map(|addresses| (alias.clone(), addresses.clone())));
            own.names_v6.extend(zone.names_v6.get(&name).map(|addresses| (alias, addresses.clone())));
        }
    }
    own
}

/// An alias may be a name, too.
fn add<A: PartialEq>(addresses: &mut Vec<A>, address: A) {
    if !addresses.contains(&address) {
        addresses.push(address);
    }
}

fn zone_of(network: &LocalNetwork) -> Zone {
    Zone { network: network.name.to_lowercase(), ..Zone::default() }
}

/// What the members of each network are called.
fn zones(all: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) -> BTreeMap<String, Zone> {
    let mut zones: BTreeMap<String, Zone> =
        all.values().filter(|network| network.has_names()).map(|n| (n.id.clone(), zone_of(n))).collect();
    for place in leases.values().flat_map(|lease| &lease.places) {
        let Some(zone) = zones.get_mut(&place.network) else { continue };
        for name in &place.names {
            let name = name.to_lowercase();
            if let Some(address) = place.address_v6 {
                add(zone.names_v6.entry(name.clone()).or_default(), address);
            }
            if let Some(address) = place.address {
                add(zone.names.entry(name).or_default(), address);
            }
        }
        if let (Some(name), Some(network)) = (place.names.first(), all.get(&place.network)) {
            let called = format!("{name}.{}", network.name);
            zone.reverse_v6.extend(place.address_v6.map(|address| (address, called.clone())));
            zone.reverse.extend(place.address.map(|address| (address, called)));
        }
    }
    zones
}
