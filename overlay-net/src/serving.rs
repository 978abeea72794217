//! The change that is made most often, and that others wait for: other tasks of a service take connections than
//! before. What follows from that is worked out alone, whatever there is besides.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use skep_api::overlay::{Fact, OverlayService, OverlayTask};
use skep_api::{NetworkId, ServiceId};
use skep_host_net::nfnetlink::Batch;

use crate::path::message::{Names, PathChange, ZoneKey};
use crate::plan::{Desired, Scene, names_of, port_chain, virtual_chain};
use crate::retarget;
use crate::ruleset::{Family, Spread, Tables};

/// What facts have become different since they were put in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Changed {
    /// Nothing but which tasks of these services take connections.
    Serving(BTreeSet<ServiceId>),
    /// Whatever.
    #[default]
    Anything,
}

impl Changed {
    pub(crate) const fn nothing() -> Self {
        Self::Serving(BTreeSet::new())
    }

    /// Takes in that a fact is there in place of another.
    pub(crate) fn note(&mut self, before: Option<&Fact>, now: &Fact) {
        let (Self::Serving(services), Some(Fact::Task(before)), Fact::Task(now)) = (&mut *self, before, now) else {
            *self = Self::Anything;
            return;
        };
        if (OverlayTask { serving: now.serving, ..before.clone() }) == *now {
            services.insert(now.service);
        } else {
            *self = Self::Anything;
        }
    }
}

/// What is to be put in place of what is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turned {
    pub(crate) names: BTreeMap<ZoneKey, Names>,
    /// Chains of the namespace inside, by family and name.
    pub(crate) chains: Vec<(Family, String, Spread)>,
}

impl Turned {
    /// Writes it into what is in force; returns what data path and kernel are to be told. None, and nothing is written, if
    /// chains would come or go.
    pub(crate) fn put_into(self, desired: &mut Desired) -> Option<(PathChange, Batch)> {
        let Tables { v4, v6 } = &mut desired.inside;
        let mut rules = [Some(v4), v6.as_mut()];
        let is_there = |(family, name, spread): &(Family, String, Spread)| {
            let held = rules[*family as usize].as_ref().and_then(|rules| rules.chains.get(name));
            held.is_some_and(|held| held.key == spread.key) && spread.fits_a_message()
        };
        if !self.chains.iter().all(is_there) {
            return None;
        }
        let mut batch = Batch::default();
        for (id, (family, name, spread)) in (1..).zip(self.chains) {
            let rules = rules[family as usize].as_mut()?;
            retarget::write(&mut batch, id, rules, (&name, &spread));
            rules.chains.insert(name, spread);
        }
        let change = PathChange { names: self.names, ..PathChange::default() };
        desired.path.apply(change.clone());
        Some((change, batch))
    }
}

/// What follows for `services`; none if it is not to be had without a look at everything.
pub(crate) fn turned(scene: &Scene<'_>, services: &BTreeSet<ServiceId>) -> Option<Turned> {
    let mut hosts: BTreeMap<(ServiceId, NetworkId), BTreeSet<Ipv4Addr>> = BTreeMap::new();
    for task in scene.tasks().filter(|task| task.serving && services.contains(&task.service)) {
        for &(network, address) in &task.addresses {
            hosts.entry((task.service, network)).or_default().insert(address);
        }
    }
    let mut turned = Turned::default();
    for service in scene.services().filter(|service| services.contains(&service.id)) {
        add(scene, &mut turned, service, &hosts)?;
    }
    Some(turned)
}

fn add(
    scene: &Scene<'_>,
    turned: &mut Turned,
    service: &OverlayService,
    hosts: &BTreeMap<(ServiceId, NetworkId), BTreeSet<Ipv4Addr>>,
) -> Option<()> {
    let families = [Family::V4, Family::V6];
    for joined in &service.networks {
        let network = scene.network(joined.network)?;
        // With nobody left, or the first one there, maps change as well.
        let hosts = hosts.get(&(service.id, network.id))?;
        let chains = families.into_iter().filter_map(|family| {
            let (_, name, spread) = virtual_chain(family, network, joined, hosts)?;
            Some((family, name, spread))
        });
        turned.chains.extend(chains);
        if network.ingress {
            for port in service.ports.iter().filter(|port| port.published_port != 0) {
                for family in families.into_iter().filter(|&family| family == Family::V4 || network.v6.is_some()) {
                    let (name, spread) = port_chain(family, network, port, hosts);
                    turned.chains.push((family, name, spread));
                }
            }
            continue;
        }
        let tasks: Vec<Ipv4Addr> = hosts.iter().copied().collect();
        let of_service = names_of(service, joined, &tasks);
        let is_taken = |other: &OverlayService| {
            let places = other.networks.iter().filter(|place| place.network == network.id);
            let mut names = places.flat_map(|place| std::iter::once(&other.name).chain(&place.aliases));
            other.id != service.id && names.any(|name| of_service.iter().any(|(own, _)| own.eq_ignore_ascii_case(name)))
        };
        if scene.services().any(is_taken) {
            return None;
        }
        let names = turned.names.entry(ZoneKey::Network(network.id)).or_default();
        for (name, addresses) in of_service {
            let follow = addresses.iter().filter_map(|&at| network.address_v6(at)).collect();
            if network.v6.is_some() {
                names.v6.insert(name.to_lowercase(), follow);
            }
            names.v4.insert(name.to_lowercase(), addresses);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use skep_api::overlay::{FactKey, OverlayNetwork, ServiceNetwork};
    use skep_api::service::PortConfig;
    use skep_api::{Ipv6Side, NodeId, SecretBytes, Subnet, TaskId};

    use super::*;
    use crate::plan::plan;

    const TASKS: u128 = 3;
    const OWN: NodeId = NodeId::from_u128(1);

    fn network(id: u128) -> Fact {
        let subnet: Subnet = format!("10.0.{id}.0/24").parse().unwrap();
        let gateway = subnet.nth(1).unwrap();
        let v6 = Ipv6Side::new(format!("fd00:{id}::/64").parse().unwrap(), None, subnet, gateway).ok();
        let (id, ingress) = (NetworkId::from_u128(id), id == 0);
        let v6 = v6.filter(|_| id != NetworkId::from_u128(2));
        let name = id.to_string();
        let (encrypted, internal, mtu_bytes) = (true, false, None);
        Fact::Network(OverlayNetwork { id, name, subnet, gateway, v6, encrypted, internal, ingress, mtu_bytes })
    }

    fn address(network: u128, service: u128, number: u128) -> Ipv4Addr {
        let last = 10 + service * 10 + number;
        Ipv4Addr::new(10, 0, u8::try_from(network).unwrap(), u8::try_from(last).unwrap())
    }

    /// In the ingress network and two others; the second has no virtual address in the last one.
    fn service(id: u128, aliases: &[String]) -> Fact {
        let joined = |network: u128| ServiceNetwork {
            network: NetworkId::from_u128(network),
            vip: (id == 0 || network < 2).then(|| address(network, id, 9)),
            aliases: aliases.to_vec(),
        };
        let port =
            PortConfig { published_port: 8080 + u16::try_from(id).unwrap(), target_port: 80, ..PortConfig::default() };
        let networks = (0..3).map(joined).collect();
        let id = ServiceId::from_u128(id);
        Fact::Service(OverlayService { id, name: format!("Web{id}"), networks, ports: vec![port] })
    }

    fn task(service: u128, number: u128, serving: bool) -> Fact {
        Fact::Task(OverlayTask {
            id: TaskId::from_u128(service * TASKS + number),
            service: ServiceId::from_u128(service),
            name: format!("web.{service}.{number}"),
            node: NodeId::from_u128(number),
            addresses: (0..3).map(|n| (NetworkId::from_u128(n), address(n, service, number))).collect(),
            serving,
        })
    }

    fn facts(serving: &[bool], aliases: &[String]) -> BTreeMap<FactKey, Fact> {
        let tasks = serving.iter().zip(0u128..).map(|(&serving, n)| task(n / TASKS, n % TASKS, serving));
        let others = (0..3).map(network).chain((0..2).map(|id| service(id, aliases)));
        others.chain(tasks).map(|fact| (fact.key(), fact)).collect()
    }

    fn scene<'a>(
        facts: &'a BTreeMap<FactKey, Fact>,
        locals: &'a BTreeMap<String, crate::plan::LocalContainer>,
        indexes: &'a BTreeMap<NodeId, u16>,
        keys: &'a [SecretBytes],
    ) -> Scene<'a> {
        Scene { own: OWN, keys, port: 1, in_kernel: false, facts, locals, indexes }
    }

    proptest! {
        #[test]
        fn what_is_turned_is_what_would_be_planned(
            before in proptest::collection::vec(any::<bool>(), 6),
            after in proptest::collection::vec(any::<bool>(), 6),
        ) {
            let (locals, indexes) = (BTreeMap::new(), BTreeMap::new());
            let (held, wanted) = (facts(&before, &[]), facts(&after, &[]));
            // What is the same is not told.
            let mut told = Changed::nothing();
            let differ = wanted.iter().filter(|(key, fact)| held.get(key) != Some(fact));
            differ.for_each(|(key, fact)| told.note(held.get(key), fact));
            let Changed::Serving(services) = told else { panic!("nothing but tasks' serving is different") };
            let mut desired = plan(&scene(&held, &locals, &indexes, &[]));
            let scene = scene(&wanted, &locals, &indexes, &[]);
            let stays = |flags: &[bool], service: usize| flags[service * 3..][..3].contains(&true);
            let possible = (0..2).all(|service| {
                let touched = services.contains(&ServiceId::from_u128(service as u128));
                !touched || (stays(&before, service) && stays(&after, service))
            });
            let done = turned(&scene, &services).and_then(|turned| turned.put_into(&mut desired));
            prop_assert_eq!(done.is_some(), possible);
            if possible {
                prop_assert_eq!(desired, plan(&scene));
            }
        }
    }

    #[test]
    fn a_shared_name_is_looked_up_among_all() {
        let (locals, indexes) = (BTreeMap::new(), BTreeMap::new());
        let facts = facts(&[true; 6], &["shared".into()]);
        assert_eq!(turned(&scene(&facts, &locals, &indexes, &[]), &[ServiceId::from_u128(0)].into()), None);
    }

    #[test]
    fn whatever_else_is_different_is_no_turn() {
        let check = |before: Option<&Fact>, now: &Fact, want: bool| {
            let mut changed = Changed::nothing();
            changed.note(before, now);
            assert_eq!(matches!(changed, Changed::Serving(_)), want, "{now:?}");
        };
        let (one, other) = (task(0, 0, true), task(0, 0, false));
        check(Some(&one), &other, true);
        check(None, &one, false);
        check(Some(&one), &task(0, 1, true), false);
        check(Some(&network(1)), &network(1), false);
    }
}
