//! A swarm of many services, for the benchmark alone.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use skep_api::overlay::{Fact, FactKey, OverlayNetwork, OverlayService, OverlayTask, Peer, ServiceNetwork};
use skep_api::{NetworkId, NodeId, SecretBytes, ServiceId, TaskId};
use skep_host_net::nfnetlink::Batch;

use crate::path::message::PeerIndex;
use crate::plan::{Desired, Scene, plan};
use crate::serving::turned;

const OWN: NodeId = NodeId::from_u128(0);
const NODES: u16 = 25;
const NETWORK: NetworkId = NetworkId::from_u128(1);

/// What a node knows of many services in one network, and what it made of it.
#[derive(Debug)]
pub struct ManyServices {
    facts: BTreeMap<FactKey, Fact>,
    indexes: BTreeMap<NodeId, PeerIndex>,
    keys: Vec<SecretBytes>,
    planned: Desired,
}

impl ManyServices {
    /// Services of `tasks` tasks each.
    #[must_use]
    pub fn new(services: u128, tasks: u128) -> Self {
        let mut many = Self {
            facts: BTreeMap::new(),
            indexes: (1..NODES).map(|index| (NodeId::from_u128(index.into()), index)).collect(),
            keys: vec![SecretBytes::new(vec![1; 32])],
            planned: Desired::default(),
        };
        let subnet = "10.0.0.0/12".parse().expect("a subnet");
        let gateway = Ipv4Addr::new(10, 0, 0, 1);
        many.add(Fact::Network(OverlayNetwork {
            id: NETWORK,
            name: "wide".into(),
            subnet,
            gateway,
            v6: None,
            encrypted: true,
            internal: false,
            ingress: false,
            mtu_bytes: None,
        }));
        for (&node, &index) in &many.indexes.clone() {
            let keys = vec![[index.to_be_bytes()[1]; 32]];
            many.add(Fact::Peer(Peer {
                node,
                hostname: node.to_string(),
                keys,
                endpoint: "192.0.2.1:4789".into(),
                kernel_port: None,
            }));
        }
        let mut addresses = (u32::from(gateway) + 1..).map(Ipv4Addr::from);
        let mut address = || addresses.next().expect("there are enough");
        for number in 0..services {
            let id = ServiceId::from_u128(number);
            let joined = ServiceNetwork { network: NETWORK, vip: Some(address()), aliases: Vec::new() };
            let name = format!("service-{number}");
            for task in 0..tasks {
                many.add(Fact::Task(OverlayTask {
                    id: TaskId::from_u128(number * tasks + task),
                    service: id,
                    name: format!("{name}.{task}.{id}"),
                    node: NodeId::from_u128((number + task) % u128::from(NODES)),
                    addresses: vec![(NETWORK, address())],
                    serving: true,
                }));
            }
            many.add(Fact::Service(OverlayService { id, name, networks: vec![joined], ports: Vec::new() }));
        }
        many.planned = many.plan();
        many
    }

    fn add(&mut self, fact: Fact) {
        self.facts.insert(fact.key(), fact);
    }

    fn plan(&self) -> Desired {
        let locals = BTreeMap::new();
        let (keys, facts, indexes) = (&self.keys, &self.facts, &self.indexes);
        plan(&Scene { own: OWN, keys, port: 4789, in_kernel: false, facts, locals: &locals, indexes })
    }

    /// All the rules, as the kernel is told of them at first.
    #[must_use]
    pub fn rules(&self) -> String {
        self.planned.inside.script()
    }

    /// A task takes connections no more, or again; returns what the kernel is told of it.
    pub fn turn_one(&mut self) -> Batch {
        let Some(Fact::Task(task)) = self.facts.get_mut(&FactKey::Task(TaskId::from_u128(3))) else {
            unreachable!("it is there")
        };
        task.serving = !task.serving;
        let services = [task.service].into();
        let locals = BTreeMap::new();
        let (keys, facts, indexes) = (&self.keys, &self.facts, &self.indexes);
        let turned =
            turned(&Scene { own: OWN, keys, port: 4789, in_kernel: false, facts, locals: &locals, indexes }, &services);
        turned.and_then(|turned| turned.put_into(&mut self.planned)).expect("others take connections").1
    }
}
