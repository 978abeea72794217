//! Services.

use std::sync::Arc;

use skep_api::service::{Endpoint, EndpointMode, ServiceSpecError, UpdateState, UpdateStatus, VirtualIp};
use skep_api::{JobStatus, Meta, Service, ServiceId, ServiceSpec};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome, Reason, ServiceChange, network};
use crate::allocator::{self, Addresses};

/// A service that is given no name is called by the beginning of its id.
const MADE_UP_NAME_LEN: usize = 12;

impl From<ServiceSpecError> for ControlError {
    fn from(error: ServiceSpecError) -> Self {
        let reason = match error {
            ServiceSpecError::Unsupported(_) => Reason::Unsupported,
            ServiceSpecError::Name(_)
            | ServiceSpecError::NoImage
            | ServiceSpecError::Replicas(_)
            | ServiceSpecError::Constraint(_)
            | ServiceSpecError::OutOfRange { .. }
            | ServiceSpecError::Invalid(_) => Reason::Invalid,
        };
        Self::new(reason, error)
    }
}

pub(super) fn create(tables: &Tables, tx: &mut Transaction, mut spec: ServiceSpec) -> Result<Outcome, ControlError> {
    let id = ServiceId::random();
    if spec.name.is_empty() {
        spec.name = id.to_string().chars().take(MADE_UP_NAME_LEN).collect();
    }
    spec.validate()?;
    check_references(tables, &spec)?;
    network::resolve(tables, &mut spec)?;
    if let Some(other) = tables.services.by_name(&spec.name) {
        return Err(ControlError::new(
            Reason::Conflict,
            format!(
                "name conflicts with an existing object: service {} already exists; choose another name",
                other.spec.name
            ),
        ));
    }
    let endpoint = endpoint(tables, tx, id, &Endpoint::default(), &spec)?;
    let job_status = spec.mode.is_job().then(|| JobStatus::first(tx.at));
    tx.create(Service {
        id,
        meta: Meta::default(),
        endpoint,
        spec,
        previous_spec: None,
        update_status: None,
        job_status,
        removed: false,
    });
    Ok(Outcome::Created(id.to_string()))
}

/// Where the service is reached from now on; addresses and ports it has stay with it.
fn endpoint(
    tables: &Tables,
    tx: &mut Transaction,
    id: ServiceId,
    before: &Endpoint,
    spec: &ServiceSpec,
) -> Result<Endpoint, ControlError> {
    let wanted = spec.endpoint_spec.clone().unwrap_or_default();
    let ports = allocator::ports(tables, id, &before.ports, &wanted.ports)?;
    let mut addresses = Addresses::read(tables, tables.tasks.iter().map(AsRef::as_ref));
    let mut virtual_ips = Vec::new();
    match spec.endpoint_mode() {
        EndpointMode::Dnsrr => {}
        EndpointMode::Vip => {
            for network in network::wanted(tables, spec) {
                // Ports are given out with the ingress network, kept address or not.
                addresses.touch(network);
                let kept = before.virtual_ips.iter().find(|vip| vip.network == network.id);
                let address = kept.map(|vip| vip.address).or_else(|| addresses.take(network));
                let address =
                    address.ok_or_else(|| ControlError::new(Reason::Conflict, allocator::is_full(network)))?;
                let prefix_len = network.subnet.prefix_len();
                virtual_ips.push(VirtualIp { network: network.id, address, prefix_len });
            }
        }
    }
    addresses.write(tables, tx);
    Ok(Endpoint { spec: wanted, ports, virtual_ips })
}

/// What a spec refers to must be there.
fn check_references(tables: &Tables, spec: &ServiceSpec) -> Result<(), ControlError> {
    let container = &spec.task_template.container;
    for reference in &container.secrets {
        if tables.secrets.get(reference.secret_id).is_none() {
            return Err(ControlError::invalid(format!(
                "secret {} ({}) does not exist: create it first",
                reference.secret_name, reference.secret_id
            )));
        }
    }
    for reference in &container.configs {
        if tables.configs.get(reference.config_id).is_none() {
            return Err(ControlError::invalid(format!(
                "config {} ({}) does not exist: create it first",
                reference.config_name, reference.config_id
            )));
        }
    }
    Ok(())
}

pub(super) fn update(
    tables: &Tables,
    tx: &mut Transaction,
    id: ServiceId,
    version: u64,
    change: ServiceChange,
) -> Result<Outcome, ControlError> {
    let before = find(tables, id)?;
    ControlError::check_version("service", version, &before.meta)?;
    let mut service = (**before).clone();
    match change {
        ServiceChange::RollBack => {
            if service.previous_spec.is_none() {
                return Err(ControlError::new(
                    Reason::Conflict,
                    format!("service {} was never updated: there is nothing to roll back to", service.spec.name),
                ));
            }
            crate::orchestrator::roll_back(&mut service, tx.at, "manually requested rollback");
        }
        ServiceChange::Spec(mut spec) => {
            spec.validate()?;
            check_references(tables, &spec)?;
            check_unchangeable(&service.spec, &spec)?;
            network::resolve(tables, &mut spec)?;
            let opens = |spec: &ServiceSpec| spec.ingress_ports().next().is_some();
            let renews = *spec.task_template != *service.spec.task_template
                || spec.host_ports().ne(service.spec.host_ports())
                || (opens(&spec) && !opens(&service.spec));
            service.previous_spec = Some(std::mem::replace(&mut service.spec, *spec));
            // The tasks' own spec keeps its identity where it did not change.
            if !renews && let Some(previous) = &service.previous_spec {
                service.spec.task_template = Arc::clone(&previous.task_template);
            }
            service.update_status = renews.then(|| UpdateStatus {
                state: UpdateState::Updating,
                started_at: tx.at,
                completed_at: None,
                message: "update in progress".into(),
            });
        }
    }
    if let Some(job) = service.job_status {
        service.job_status = Some(job.next(tx.at));
        service.update_status = None;
    }
    service.endpoint = endpoint(tables, tx, id, &before.endpoint, &service.spec)?;
    tx.update(service);
    Ok(Outcome::Done)
}

fn check_unchangeable(before: &ServiceSpec, after: &ServiceSpec) -> Result<(), ControlError> {
    if before.name != after.name {
        return Err(ControlError::new(
            Reason::Unsupported,
            format!("renaming services is not supported: {} cannot become {}", before.name, after.name),
        ));
    }
    if std::mem::discriminant(&before.mode) != std::mem::discriminant(&after.mode) {
        return Err(ControlError::new(
            Reason::Unsupported,
            format!("service mode change is not allowed: remove service {} and create it anew", before.name),
        ));
    }
    Ok(())
}

/// Marks the service removed: it is in no list any more, and goes with its last task.
pub(super) fn remove(tables: &Tables, tx: &mut Transaction, id: ServiceId) -> Result<Outcome, ControlError> {
    let mut service = (**find(tables, id)?).clone();
    service.removed = true;
    tx.update(service);
    Ok(Outcome::Done)
}

fn find(tables: &Tables, id: ServiceId) -> Result<&Arc<Service>, ControlError> {
    let service = tables.services.get(id).filter(|service| !service.removed);
    service.ok_or_else(|| ControlError::not_found("service", id))
}
