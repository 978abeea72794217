//! What the worker was given: tasks, the payloads they may read, the volumes they may use.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use skep_api::config::CONFIG_LEN_MAX;
use skep_api::container::{ContainerSpec, FileTarget};
use skep_api::expansion::{Found, TemplateContext, TemplateNode};
use skep_api::grpc::Assignments;
use skep_api::secret::SECRET_LEN_MAX;
use skep_api::volume::VolumeAssignment;
use skep_api::{
    Config, ConfigId, ConfigSpec, Secret, SecretBytes, SecretId, SecretSpec, Task, TaskId, VolumeId, encoding,
};
use skep_engine::Payload;

/// Secrets and configs as they are now; shared with the runners.
#[derive(Clone, Default)]
pub(crate) struct Payloads(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    secrets: BTreeMap<SecretId, Given>,
    configs: BTreeMap<ConfigId, Given>,
}

/// What a secret or a config holds.
struct Given {
    bytes: SecretBytes,
    is_template: bool,
    is_secret: bool,
    /// As long as it may become.
    len_max: usize,
}

/// What a set of messages asks for.
#[derive(Debug, Default)]
pub(crate) struct Update {
    /// It names everything: what it does not name is to go.
    pub(crate) complete: bool,
    pub(crate) tasks: Vec<Task>,
    pub(crate) removed: Vec<TaskId>,
    pub(crate) volumes: Vec<VolumeAssignment>,
    pub(crate) removed_volumes: Vec<VolumeId>,
}

/// Puts the parts of a set together.
#[derive(Debug, Default)]
pub(crate) struct Inbox(Update);

impl Payloads {
    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.lock().expect("nobody panics while holding it")
    }

    /// The files that a task's container is to have, filled in where they are templates.
    pub(crate) fn for_task(&self, task: &Task, node: &TemplateNode) -> Result<Vec<Payload>, String> {
        let held = self.lock();
        let context = TemplateContext::new(task, node);
        let container = task.spec.container.filled(&context).map_err(|error| error.to_string())?;
        let fill = |given: &Given, name: &str| {
            if !given.is_template {
                return Ok(given.bytes.clone());
            }
            // What goes wrong is told to all who see the task: nothing that is secret may be in it.
            let (quiet, missing) = (Cell::new(given.is_secret), RefCell::new(None));
            let other = |kind: &str, name: &str| {
                let found = held.of_container(&container, kind, name);
                quiet.set(quiet.get() || kind == "secret");
                if let Some(Err(why)) = &found {
                    missing.replace(Some(why.clone()));
                }
                found
            };
            let filled = context.fill_payload(text(&given.bytes, name)?, &other).map_err(|error| {
                let why = match (missing.take(), quiet.get()) {
                    (Some(why), _) => why,
                    (None, true) => "its template names something that is not there, or cannot be printed".into(),
                    (None, false) => error.to_string(),
                };
                format!("{name} cannot be filled in: {why}")
            })?;
            match filled.len() {
                len if len > given.len_max => {
                    Err(format!("{name} comes to {len} bytes: {} are allowed", given.len_max))
                }
                _ => Ok(SecretBytes::new(filled.into_bytes())),
            }
        };
        let file = |dir: &str, file: &FileTarget, given: Option<&Given>, name: &str| {
            let given = given.ok_or_else(|| format!("{name} was not handed to this node"))?;
            payload(dir, file, fill(given, name)?, name)
        };
        let secrets = container.secrets.iter().map(|reference| {
            file("/run/secrets", &reference.file, held.secrets.get(&reference.secret_id), &reference.secret_name)
        });
        let configs = container
            .configs
            .iter()
            .map(|reference| file("", &reference.file, held.configs.get(&reference.config_id), &reference.config_name));
        secrets.chain(configs).collect()
    }
}

impl Held {
    /// What a template gets for `secret "TARGET"`, `config "TARGET"` and `env "NAME"`; none of other functions.
    fn of_container(&self, container: &ContainerSpec, kind: &str, name: &str) -> Option<Found> {
        let given = match kind {
            "secret" => {
                let found = container.secrets.iter().find(|reference| reference.file.name == name);
                found.and_then(|reference| self.secrets.get(&reference.secret_id))
            }
            "config" => {
                let found = container.configs.iter().find(|reference| reference.file.name == name);
                found.and_then(|reference| self.configs.get(&reference.config_id))
            }
            "env" => {
                let value = container.env.iter().find_map(|var| var.strip_prefix(name)?.strip_prefix('='));
                return Some(Ok(value.unwrap_or_default().to_owned()));
            }
            _ => return None,
        };
        let missing = || format!("the service has no {kind} with the target {name}");
        Some(given.ok_or_else(missing).and_then(|given| text(&given.bytes, name).map(str::to_owned)))
    }
}

fn text<'a>(bytes: &'a SecretBytes, name: &str) -> Result<&'a str, String> {
    std::str::from_utf8(bytes.expose()).map_err(|_| format!("{name} is no text in UTF-8, which templates are made of"))
}

fn payload(default_dir: &str, file: &FileTarget, bytes: SecretBytes, name: &str) -> Result<Payload, String> {
    let target = if file.name.starts_with('/') { file.name.clone() } else { format!("{default_dir}/{}", file.name) };
    let number = |text: &str| text.parse().map_err(|_| format!("{name}: {text:?} is no user or group number"));
    Ok(Payload { target, bytes, uid: number(&file.uid)?, gid: number(&file.gid)?, mode: file.mode })
}

impl Inbox {
    /// Takes one message; the whole update once its last part is in.
    pub(crate) fn take(
        &mut self,
        part: Assignments,
        payloads: &Payloads,
    ) -> Result<Option<Update>, encoding::DecodeError> {
        {
            let mut held = payloads.lock();
            for bytes in &part.secrets {
                let secret: Secret = encoding::decode(bytes)?;
                let SecretSpec { data: bytes, templating, .. } = secret.spec;
                let given =
                    Given { bytes, is_template: templating.is_some(), is_secret: true, len_max: SECRET_LEN_MAX };
                held.secrets.insert(secret.id, given);
            }
            for bytes in &part.configs {
                let config: Config = encoding::decode(bytes)?;
                let ConfigSpec { data: bytes, templating, .. } = config.spec;
                let given =
                    Given { bytes, is_template: templating.is_some(), is_secret: false, len_max: CONFIG_LEN_MAX };
                held.configs.insert(config.id, given);
            }
            for id in part.removed_secrets.iter().filter_map(|bytes| SecretId::from_bytes(bytes)) {
                held.secrets.remove(&id);
            }
            for id in part.removed_configs.iter().filter_map(|bytes| ConfigId::from_bytes(bytes)) {
                held.configs.remove(&id);
            }
        }
        self.0.complete |= part.complete;
        for bytes in &part.tasks {
            self.0.tasks.push(encoding::decode(bytes)?);
        }
        self.0.removed.extend(part.removed_tasks.iter().filter_map(|bytes| TaskId::from_bytes(bytes)));
        for bytes in &part.volumes {
            self.0.volumes.push(encoding::decode(bytes)?);
        }
        self.0.removed_volumes.extend(part.removed_volumes.iter().filter_map(|bytes| VolumeId::from_bytes(bytes)));
        Ok(part.last.then(|| std::mem::take(&mut self.0)))
    }
}
