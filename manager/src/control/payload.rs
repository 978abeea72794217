//! Secrets and configs.

use skep_api::secret::PayloadError;
use skep_api::{Config, ConfigId, ConfigSpec, Meta, ObjectKey, Secret, SecretId, SecretSpec, Service};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome, Reason};

impl From<PayloadError> for ControlError {
    fn from(error: PayloadError) -> Self {
        let reason = match error {
            PayloadError::Unsupported { .. } => Reason::Unsupported,
            PayloadError::Name(_)
            | PayloadError::Empty { .. }
            | PayloadError::TooLarge { .. }
            | PayloadError::Template { .. } => Reason::Invalid,
        };
        Self::new(reason, error)
    }
}

const LABELS_ONLY: &str = "only updates to Labels are allowed: create a new one and let the service use that";

pub(super) fn create_secret(tx: &mut Transaction, spec: SecretSpec) -> Result<Outcome, ControlError> {
    spec.validate()?;
    let id = SecretId::random();
    tx.create(Secret { id, meta: Meta::default(), spec });
    Ok(Outcome::Created(id.to_string()))
}

pub(super) fn update_secret(
    tables: &Tables,
    tx: &mut Transaction,
    id: SecretId,
    version: u64,
    spec: SecretSpec,
) -> Result<Outcome, ControlError> {
    let mut secret = tables.secrets.get(id).ok_or_else(|| ControlError::not_found("secret", id))?.as_ref().clone();
    ControlError::check_version("secret", version, &secret.meta)?;
    let same_data = spec.data.is_empty() || spec.data == secret.spec.data;
    if spec.name != secret.spec.name || !same_data {
        return Err(ControlError::invalid(LABELS_ONLY));
    }
    secret.spec.labels = spec.labels;
    tx.update(secret);
    Ok(Outcome::Done)
}

pub(super) fn remove_secret(tables: &Tables, tx: &mut Transaction, id: SecretId) -> Result<Outcome, ControlError> {
    let secret = tables.secrets.get(id).ok_or_else(|| ControlError::not_found("secret", id))?;
    check_unused(tables, "secret", &secret.spec.name, |service| {
        service.spec.task_template.container.secrets.iter().any(|reference| reference.secret_id == id)
    })?;
    if let Some(volume) = tables.volumes.iter().find(|volume| volume.secrets().any(|(_, secret)| secret == id)) {
        let (secret, volume) = (&secret.spec.name, &volume.spec.name);
        return Err(ControlError::invalid(format!(
            "secret '{secret}' is in use by volume {volume}: remove that first"
        )));
    }
    tx.delete(ObjectKey::Secret(id), secret.meta.version);
    Ok(Outcome::Done)
}

pub(super) fn create_config(tx: &mut Transaction, spec: ConfigSpec) -> Result<Outcome, ControlError> {
    spec.validate()?;
    let id = ConfigId::random();
    tx.create(Config { id, meta: Meta::default(), spec });
    Ok(Outcome::Created(id.to_string()))
}

pub(super) fn update_config(
    tables: &Tables,
    tx: &mut Transaction,
    id: ConfigId,
    version: u64,
    spec: ConfigSpec,
) -> Result<Outcome, ControlError> {
    let mut config = tables.configs.get(id).ok_or_else(|| ControlError::not_found("config", id))?.as_ref().clone();
    ControlError::check_version("config", version, &config.meta)?;
    let same_data = spec.data.is_empty() || spec.data == config.spec.data;
    if spec.name != config.spec.name || !same_data {
        return Err(ControlError::invalid(LABELS_ONLY));
    }
    config.spec.labels = spec.labels;
    tx.update(config);
    Ok(Outcome::Done)
}

pub(super) fn remove_config(tables: &Tables, tx: &mut Transaction, id: ConfigId) -> Result<Outcome, ControlError> {
    let config = tables.configs.get(id).ok_or_else(|| ControlError::not_found("config", id))?;
    check_unused(tables, "config", &config.spec.name, |service| {
        service.spec.task_template.container.configs.iter().any(|reference| reference.config_id == id)
    })?;
    tx.delete(ObjectKey::Config(id), config.meta.version);
    Ok(Outcome::Done)
}

fn check_unused(tables: &Tables, kind: &str, name: &str, uses: impl Fn(&Service) -> bool) -> Result<(), ControlError> {
    let users: Vec<&str> = tables
        .services
        .iter()
        .filter(|service| !service.removed && uses(service))
        .map(|service| service.spec.name.as_str())
        .collect();
    if users.is_empty() {
        return Ok(());
    }
    let noun = if users.len() == 1 { "service" } else { "services" };
    Err(ControlError::invalid(format!(
        "{kind} '{name}' is in use by the following {noun}: {}; take it out of there first",
        users.join(", ")
    )))
}
