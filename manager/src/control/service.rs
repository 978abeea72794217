//! Services.

use std::sync::Arc;

use skep_api::service::{Endpoint, ServiceSpecError, UpdateState, UpdateStatus};
use skep_api::{Meta, Service, ServiceId, ServiceMode, ServiceSpec};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome, Reason, ServiceChange};

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

pub(super) fn create(tables: &Tables, tx: &mut Transaction, spec: ServiceSpec) -> Result<Outcome, ControlError> {
    spec.validate()?;
    check_references(tables, &spec)?;
    if let Some(other) = tables.services.by_name(&spec.name) {
        return Err(ControlError::new(
            Reason::Conflict,
            format!(
                "name conflicts with an existing object: service {} already exists; choose another name",
                other.spec.name
            ),
        ));
    }
    let id = ServiceId::random();
    tx.create(Service {
        id,
        meta: Meta::default(),
        endpoint: endpoint(&spec),
        spec,
        previous_spec: None,
        update_status: None,
        removed: false,
    });
    Ok(Outcome::Created(id.to_string()))
}

fn endpoint(spec: &ServiceSpec) -> Endpoint {
    let spec = spec.endpoint_spec.clone().unwrap_or_default();
    Endpoint { ports: spec.ports.clone(), spec }
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
    if before.meta.version != version {
        return Err(ControlError::stale("service", version, before.meta.version));
    }
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
        ServiceChange::Spec(spec) => {
            spec.validate()?;
            check_references(tables, &spec)?;
            check_unchangeable(&service.spec, &spec)?;
            let renews =
                *spec.task_template != *service.spec.task_template || spec.host_ports().ne(service.spec.host_ports());
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
    service.endpoint = endpoint(&service.spec);
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
    match (before.mode, after.mode) {
        (ServiceMode::Replicated { .. }, ServiceMode::Replicated { .. })
        | (ServiceMode::Global, ServiceMode::Global) => Ok(()),
        (ServiceMode::Replicated { .. }, ServiceMode::Global)
        | (ServiceMode::Global, ServiceMode::Replicated { .. }) => Err(ControlError::new(
            Reason::Unsupported,
            format!("service mode change is not allowed: remove service {} and create it anew", before.name),
        )),
    }
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
