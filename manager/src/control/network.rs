//! Networks: made, removed; and what services say of them.

use std::sync::Arc;

use skep_api::network::NetworkSpecError;
use skep_api::task::NetworkAttachmentConfig;
use skep_api::{Cluster, Meta, Network, NetworkId, NetworkSpec, ObjectKey, ServiceSpec};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome, Reason};
use crate::allocator;

/// Networks that every node has of its own; services may ask for them by name.
pub const PREDEFINED: [&str; 3] = ["bridge", "host", "none"];

impl From<NetworkSpecError> for ControlError {
    fn from(error: NetworkSpecError) -> Self {
        let reason = match error {
            NetworkSpecError::Unsupported { .. } => Reason::Unsupported,
            NetworkSpecError::Name(_) | NetworkSpecError::Invalid(_) => Reason::Invalid,
        };
        Self::new(reason, error)
    }
}

pub(super) fn create(tables: &Tables, tx: &mut Transaction, spec: NetworkSpec) -> Result<Outcome, ControlError> {
    spec.validate()?;
    if PREDEFINED.contains(&spec.name.as_str()) {
        return Err(ControlError::new(
            Reason::Conflict,
            format!("network {} is there on every node: choose another name", spec.name),
        ));
    }
    if spec.ingress
        && let Some(other) = allocator::ingress(tables)
    {
        return Err(ControlError::new(
            Reason::Conflict,
            format!("ingress network ({}) is already present: remove it first", other.spec.name),
        ));
    }
    let cluster = tables.cluster().ok_or_else(ControlError::no_leader)?;
    let others: Vec<&Network> = tables.networks.iter().map(AsRef::as_ref).collect();
    let network = make(&others, cluster, spec)?;
    let id = network.id;
    tx.create(network);
    // Two networks made at the same time must not get the same subnet: they clash over this.
    match tables.networks.iter().next() {
        Some(first) => tx.update((**first).clone()),
        None => tx.update((**cluster).clone()),
    }
    Ok(Outcome::Created(id.to_string()))
}

/// A new network beside `others`, with its addresses.
pub(crate) fn make(others: &[&Network], cluster: &Cluster, spec: NetworkSpec) -> Result<Network, ControlError> {
    let (subnet, gateway) = allocator::subnet(others, cluster, &spec)?;
    let v6 = if spec.ipv6 { Some(allocator::ipv6_side(others, &spec, subnet, gateway)?) } else { None };
    Ok(Network { id: NetworkId::random(), meta: Meta::default(), spec, subnet, gateway, v6, cursor: 0 })
}

pub(super) fn remove(tables: &Tables, tx: &mut Transaction, id: NetworkId) -> Result<Outcome, ControlError> {
    let network = tables.networks.get(id).ok_or_else(|| ControlError::not_found("network", id))?;
    let name = &network.spec.name;
    let uses = |service: &&Arc<skep_api::Service>| {
        service.endpoint.virtual_ips.iter().any(|vip| vip.network == id)
            || wanted(tables, &service.spec).any(|wanted| wanted.id == id)
    };
    if let Some(service) = tables.services.iter().filter(|service| !service.removed).find(uses) {
        let user = &service.spec.name;
        let message = match network.spec.ingress {
            true => format!(
                "ingress network cannot be removed because service {user} depends on it: publish no ports by it"
            ),
            false => format!("network {name} is in use by service {user}: take it out of there first"),
        };
        return Err(ControlError::new(Reason::Conflict, message));
    }
    let live = |task: &&Arc<skep_api::Task>| {
        !task.status.state.is_terminal() && task.networks.iter().any(|attachment| attachment.network == id)
    };
    if let Some(task) = tables.tasks.iter().find(live) {
        return Err(ControlError::new(
            Reason::Settling,
            format!("network {name} is in use by task {}: wait until it has stopped", task.name()),
        ));
    }
    if let Some(attachment) = tables.attachments.iter().find(|attachment| attachment.network == id) {
        return Err(ControlError::new(
            Reason::Conflict,
            format!(
                "network {name} is in use by container {} on node {}: disconnect it first",
                attachment.names.first().unwrap_or(&attachment.container),
                attachment.node
            ),
        ));
    }
    if let Some(service) = tables.services.iter().find(uses) {
        return Err(ControlError::new(
            Reason::Settling,
            format!("network {name} is in use by service {}, which is being removed", service.spec.name),
        ));
    }
    tx.delete(ObjectKey::Network(id), network.meta.version);
    Ok(Outcome::Done)
}

/// The swarm's networks that tasks of a service join, the ingress network first.
pub(crate) fn wanted<'a>(tables: &'a Tables, spec: &'a ServiceSpec) -> impl Iterator<Item = &'a Arc<Network>> {
    let ingress = spec.ingress_ports().next().and_then(|_| allocator::ingress(tables));
    let named =
        spec.task_template.networks.iter().filter_map(|wanted| tables.networks.get(wanted.target.parse().ok()?));
    ingress.into_iter().chain(named)
}

/// Puts the ids of networks where their names stand, and checks that services may join them.
pub(super) fn resolve(tables: &Tables, spec: &mut ServiceSpec) -> Result<(), ControlError> {
    if spec.ingress_ports().next().is_some() && allocator::ingress(tables).is_none() {
        return Err(ControlError::invalid(
            "there is no ingress network to publish ports through: make one with 'network create --ingress'",
        ));
    }
    if spec.task_template.networks.is_empty() {
        return Ok(());
    }
    let mut networks = spec.task_template.networks.clone();
    for wanted in &mut networks {
        resolve_one(tables, wanted)?;
    }
    for (index, wanted) in networks.iter().enumerate() {
        if networks[..index].iter().any(|other| other.target == wanted.target) {
            return Err(ControlError::invalid(format!("network {} is named twice: once is enough", wanted.target)));
        }
    }
    let predefined = networks.iter().find(|wanted| PREDEFINED.contains(&wanted.target.as_str()));
    if let Some(predefined) = predefined
        && (networks.len() > 1 || spec.ingress_ports().next().is_some())
    {
        return Err(ControlError::invalid(format!(
            "network {} cannot be joined beside others, nor with ports published through the routing mesh",
            predefined.target
        )));
    }
    if networks != spec.task_template.networks {
        Arc::make_mut(&mut spec.task_template).networks = networks;
    }
    Ok(())
}

fn resolve_one(tables: &Tables, wanted: &mut NetworkAttachmentConfig) -> Result<(), ControlError> {
    if PREDEFINED.contains(&wanted.target.as_str()) {
        return Ok(());
    }
    let by_id = wanted.target.parse().ok().and_then(|id| tables.networks.get(id));
    let network = by_id.or_else(|| tables.networks.by_name(&wanted.target)).ok_or_else(|| {
        ControlError::not_found(
            "network",
            format!("{}: create it with 'network create -d overlay' first;", wanted.target),
        )
    })?;
    if network.spec.ingress {
        return Err(ControlError::invalid(format!(
            "services cannot be attached to the ingress network ({}) by name: publish a port instead",
            network.spec.name
        )));
    }
    wanted.target = network.id.to_string();
    Ok(())
}
