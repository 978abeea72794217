//! The names of a network, and what they stand for.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use skep_api::NetworkId;
use skep_api::overlay::{OverlayNetwork, OverlayService, ServiceNetwork};
use skep_name_server::Zone;

use super::{Backends, Scene};

/// The names that hold in one network.
pub(super) fn zone(scene: &Scene<'_>, network: &OverlayNetwork, backends: &Backends) -> Zone {
    let mut zone = Zone { network: network.name.to_lowercase(), ..Zone::default() };
    let mut add = |name: &str, addresses: &[Ipv4Addr]| {
        let held = zone.names.entry(name.to_lowercase()).or_default();
        held.extend(addresses);
        held.sort_unstable();
        held.dedup();
    };
    for service in scene.services() {
        let Some(joined) = service.networks.iter().find(|joined| joined.network == network.id) else { continue };
        let tasks: Vec<Ipv4Addr> = backends.get(&(service.id, network.id)).into_iter().flatten().copied().collect();
        for (name, addresses) in names_of(service, joined, &tasks) {
            add(&name, &addresses);
        }
    }
    for task in scene.tasks() {
        for &(_, address) in task.addresses.iter().filter(|(id, _)| *id == network.id) {
            add(&task.name, &[address]);
        }
    }
    // What services and tasks are called is not to be had by calling a container so.
    let theirs: BTreeSet<String> = zone.names.keys().cloned().collect();
    for held in scene.attachments().filter(|held| held.network == network.id) {
        for name in held.names.iter().map(|name| name.to_lowercase()).filter(|name| !theirs.contains(name)) {
            zone.names.entry(name).or_default().push(held.address);
        }
    }
    zone.reverse = called(scene, network.id).map(|(at, name)| (at, format!("{name}.{}", network.name))).collect();
    if let Some(side) = network.v6 {
        let follows = |&at: &Ipv4Addr| side.address(network.subnet, at);
        let of_name = |(name, at): (&String, &Vec<Ipv4Addr>)| (name.clone(), at.iter().map(follows).collect());
        zone.names_v6 = zone.names.iter().map(of_name).collect();
        zone.reverse_v6 = zone.reverse.iter().map(|(at, name)| (follows(at), name.clone())).collect();
    }
    zone
}

/// What a service is called in a network, with the addresses that each name stands for.
pub(crate) fn names_of(
    service: &OverlayService,
    joined: &ServiceNetwork,
    tasks: &[Ipv4Addr],
) -> Vec<(String, Vec<Ipv4Addr>)> {
    let own = joined.vip.map_or_else(|| tasks.to_vec(), |vip| vec![vip]);
    let both = |name: &String| [(name.clone(), own.clone()), (format!("tasks.{name}"), tasks.to_vec())];
    std::iter::once(&service.name).chain(&joined.aliases).flat_map(both).collect()
}

/// What each address of a network is called.
fn called<'a>(scene: &'a Scene<'_>, network: NetworkId) -> impl Iterator<Item = (Ipv4Addr, &'a String)> {
    let tasks = scene.tasks().flat_map(move |task| {
        let own = task.addresses.iter().filter(move |(id, _)| *id == network);
        own.map(|&(_, address)| (address, &task.name))
    });
    let containers = scene.attachments().filter(move |held| held.network == network);
    let services = scene.services().filter_map(move |service| {
        let vip = service.networks.iter().find(|joined| joined.network == network)?.vip?;
        Some((vip, &service.name))
    });
    tasks.chain(containers.filter_map(|held| Some((held.address, held.names.first()?)))).chain(services)
}
