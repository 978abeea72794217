//! Single containers in networks of the swarm: what one node wants of them, and what it is given.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::SystemTime;

use skep_api::attachment::PER_NODE_MAX;
use skep_api::grpc::{AttachmentReply, AttachmentWishes};
use skep_api::{
    AttachmentGrant, AttachmentId, AttachmentWish, Meta, Network, NetworkAttachment, NodeId, ObjectKey, Timestamp,
    encoding,
};
use skep_raft_store::{Store, Tables, Transaction, UpdateError};
use tonic::Status;

use crate::allocator::{self, Addresses};

/// Writes down what a node wants; what it does not want any more is given back. One answer per wish.
pub(super) async fn take(
    store: &Store,
    node: NodeId,
    wanted: AttachmentWishes,
) -> Result<Vec<AttachmentReply>, Status> {
    let invalid = |why: &str| Status::invalid_argument(why.to_owned());
    let wishes: Vec<AttachmentWish> = wanted
        .wishes
        .iter()
        .map(|bytes| encoding::decode(bytes).map_err(|error| invalid(&error.to_string())))
        .collect::<Result<_, _>>()?;
    let released: BTreeSet<AttachmentId> = wanted
        .released
        .iter()
        .map(|bytes| AttachmentId::from_bytes(bytes).ok_or_else(|| invalid("no attachment id")))
        .collect::<Result<_, _>>()?;
    let written = store.update(|tables| {
        let now = Timestamp::from_system(SystemTime::now());
        Ok::<_, Infallible>(settle(tables, node, &wishes, &released, wanted.complete, now))
    });
    let answers = written.await.map_err(|error| match error {
        UpdateError::Propose(error) => Status::unavailable(error.to_string()),
        UpdateError::Caller(never) => match never {},
    })?;
    Ok(wishes.iter().zip(answers).map(|(wish, answer)| reply(wish.id, answer)).collect())
}

fn reply(id: AttachmentId, answer: Result<AttachmentGrant, String>) -> AttachmentReply {
    let (grant, refusal) = match answer {
        Ok(grant) => (encoding::encode(&grant), String::new()),
        Err(refusal) => (Vec::new(), refusal),
    };
    AttachmentReply { id: id.to_bytes().to_vec(), grant, refusal }
}

type Answer = Result<AttachmentGrant, String>;

fn settle(
    tables: &Tables,
    node: NodeId,
    wishes: &[AttachmentWish],
    released: &BTreeSet<AttachmentId>,
    complete: bool,
    now: Timestamp,
) -> (Transaction, Vec<Answer>) {
    let mut tx = Transaction::new(now);
    let wanted: BTreeSet<AttachmentId> = wishes.iter().map(|wish| wish.id).collect();
    let of_node = || tables.attachments.iter().filter(|attachment| attachment.node == node);
    let is_over = |attachment: &NetworkAttachment| {
        released.contains(&attachment.id) || (complete && !wanted.contains(&attachment.id))
    };
    for over in of_node().filter(|attachment| is_over(attachment)) {
        tx.delete(ObjectKey::NetworkAttachment(over.id), over.meta.version);
    }
    let mut held = of_node().filter(|attachment| !is_over(attachment)).count();
    let mut addresses = Addresses::read(tables, tables.tasks.iter().map(AsRef::as_ref));
    let answers = wishes.iter().map(|wish| {
        if let Some(attachment) = tables.attachments.get(wish.id).filter(|attachment| attachment.node == node) {
            let network = tables.networks.get(attachment.network).ok_or("the network is gone")?;
            wish.validate()?;
            if attachment.names != wish.names {
                tx.update(NetworkAttachment { names: wish.names.clone(), ..(**attachment).clone() });
            }
            return Ok(grant(network, attachment));
        }
        let (attachment, network) = attach(tables, node, wish, held, &mut addresses)?;
        held += 1;
        let granted = grant(network, &attachment);
        tx.create(attachment);
        Ok(granted)
    });
    let answers = answers.collect();
    addresses.write(tables, &mut tx);
    (tx, answers)
}

fn attach<'a>(
    tables: &'a Tables,
    node: NodeId,
    wish: &AttachmentWish,
    held: usize,
    addresses: &mut Addresses,
) -> Result<(NetworkAttachment, &'a Network), String> {
    wish.validate()?;
    if tables.attachments.get(wish.id).is_some() {
        return Err("the attachment's id is another node's".into());
    }
    if held >= PER_NODE_MAX {
        return Err(format!("this node has {held} containers in networks of the swarm: it can have no more"));
    }
    let by_id = wish.network.parse().ok().and_then(|id| tables.networks.get(id));
    let network = by_id.or_else(|| tables.networks.by_name(&wish.network));
    let network = network.ok_or_else(|| format!("network {} not found", wish.network))?;
    let name = &network.spec.name;
    if !network.spec.attachable {
        return Err(format!(
            "network {name} is not manually attachable: make it with --attachable, or run a service in it"
        ));
    }
    let address = match wish.address {
        Some(address) => addresses.claim(network, address)?,
        None => addresses.take(network).ok_or_else(|| allocator::is_full(network))?,
    };
    let attachment = NetworkAttachment {
        id: wish.id,
        meta: Meta::default(),
        node,
        container: wish.container.clone(),
        network: network.id,
        address,
        names: wish.names.clone(),
    };
    Ok((attachment, network))
}

fn grant(network: &Network, attachment: &NetworkAttachment) -> AttachmentGrant {
    AttachmentGrant {
        id: attachment.id,
        network: network.id,
        network_name: network.spec.name.clone(),
        subnet: network.subnet,
        gateway: network.gateway,
        internal: network.spec.internal,
        address: attachment.address,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use skep_api::{NetworkId, NetworkSpec, Subnet};

    use super::*;

    const NODE: NodeId = NodeId::from_u128(1);

    struct Swarm {
        tables: Tables,
    }

    impl Swarm {
        fn new() -> Self {
            let mut tables = Tables::default();
            let mut tx = Transaction::new(Timestamp::NEVER);
            for (id, name, attachable) in [(1, "open", true), (2, "closed", false)] {
                let subnet: Subnet = format!("10.0.{id}.0/29").parse().unwrap();
                let spec = NetworkSpec { name: name.into(), attachable, ..NetworkSpec::default() };
                let (id, gateway) = (NetworkId::from_u128(id), subnet.nth(1).unwrap());
                tx.create(Network { id, meta: Meta::default(), spec, subnet, gateway, v6: None, cursor: 0 });
            }
            tables.apply_for_test(1, tx).unwrap();
            Self { tables }
        }

        fn settle(
            &mut self,
            node: NodeId,
            wishes: &[AttachmentWish],
            released: &[u128],
            complete: bool,
        ) -> Vec<Answer> {
            let released = released.iter().map(|&id| AttachmentId::from_u128(id)).collect();
            let (tx, answers) = settle(&self.tables, node, wishes, &released, complete, Timestamp::NEVER);
            self.tables.apply_for_test(self.tables.index + 1, tx).unwrap();
            answers
        }

        fn held(&self) -> Vec<String> {
            self.tables.attachments.iter().map(|held| format!("{} {}", held.container, held.address)).collect()
        }
    }

    fn wish(id: u128, network: &str, address: Option<&str>) -> AttachmentWish {
        AttachmentWish {
            id: AttachmentId::from_u128(id),
            container: format!("c{id}"),
            network: network.into(),
            names: vec!["db".into()],
            address: address.map(|text| text.parse().unwrap()),
        }
    }

    #[test]
    fn places_are_given_once_and_come_back() {
        let mut swarm = Swarm::new();
        let first = swarm.settle(NODE, &[wish(1, "open", None), wish(2, "OPEN", Some("10.0.1.5"))], &[], true);
        assert_eq!(first[0].as_ref().unwrap().address, Ipv4Addr::new(10, 0, 1, 2));
        // Asked again, as after a change of the leader, the same is answered.
        let again = swarm.settle(NODE, &[wish(1, "open", None), wish(2, "open", None)], &[], true);
        assert_eq!(again, first);
        assert_eq!(swarm.held(), ["c1 10.0.1.2", "c2 10.0.1.5"]);
        swarm.settle(NODE, &[], &[1], false);
        assert_eq!(swarm.held(), ["c2 10.0.1.5"]);
        // Another node neither takes nor ends what is not its own.
        let theirs = swarm.settle(NodeId::from_u128(2), &[wish(2, "open", None)], &[2], true);
        assert!(theirs[0].is_err());
        assert_eq!(swarm.held(), ["c2 10.0.1.5"]);
        swarm.settle(NODE, &[], &[], true);
        assert!(swarm.held().is_empty());
    }

    #[track_caller]
    fn refused(wish: AttachmentWish, why: &str) {
        let mut swarm = Swarm::new();
        swarm.settle(NODE, &[self::wish(9, "open", Some("10.0.1.4"))], &[], false);
        let answer = swarm.settle(NODE, &[wish], &[], false).remove(0).unwrap_err();
        assert!(answer.contains(why), "{answer}");
        assert_eq!(swarm.held().len(), 1);
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        refused(wish(1, "nope", None), "network nope not found");
        refused(wish(1, "closed", None), "--attachable");
        refused(wish(1, "open", Some("10.0.1.4")), "10.0.1.4 of network open is in use");
        refused(wish(1, "open", Some("10.0.9.4")), "10.0.1.0/29");
        refused(AttachmentWish { names: vec![String::new()], ..wish(1, "open", None) }, "names");
    }
}
