//! What the worker was given: tasks, and the payloads they may read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use skep_api::container::FileTarget;
use skep_api::grpc::Assignments;
use skep_api::{Config, ConfigId, Secret, SecretBytes, SecretId, Task, TaskId, encoding};
use skep_engine::Payload;

/// Secrets and configs as they are now; shared with the runners.
#[derive(Clone, Default)]
pub(crate) struct Payloads(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    secrets: BTreeMap<SecretId, SecretBytes>,
    configs: BTreeMap<ConfigId, SecretBytes>,
}

/// What a set of messages asks for.
#[derive(Debug, Default)]
pub(crate) struct Update {
    /// It names everything: what it does not name is to go.
    pub(crate) complete: bool,
    pub(crate) tasks: Vec<Task>,
    pub(crate) removed: Vec<TaskId>,
}

/// Puts the parts of a set together.
#[derive(Debug, Default)]
pub(crate) struct Inbox(Update);

impl Payloads {
    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.lock().expect("nobody panics while holding it")
    }

    /// The files that a task's container is to have.
    pub(crate) fn for_task(&self, task: &Task) -> Result<Vec<Payload>, String> {
        let held = self.lock();
        let container = &task.spec.container;
        let secrets = container.secrets.iter().map(|reference| {
            let bytes = held.secrets.get(&reference.secret_id);
            payload("/run/secrets", &reference.file, bytes, &reference.secret_name)
        });
        let configs = container.configs.iter().map(|reference| {
            let bytes = held.configs.get(&reference.config_id);
            payload("", &reference.file, bytes, &reference.config_name)
        });
        secrets.chain(configs).collect()
    }
}

fn payload(default_dir: &str, file: &FileTarget, bytes: Option<&SecretBytes>, name: &str) -> Result<Payload, String> {
    let bytes = bytes.ok_or_else(|| format!("{name} was not handed to this node"))?;
    let target = if file.name.starts_with('/') { file.name.clone() } else { format!("{default_dir}/{}", file.name) };
    let number = |text: &str| text.parse().map_err(|_| format!("{name}: {text:?} is no user or group number"));
    Ok(Payload { target, bytes: bytes.clone(), uid: number(&file.uid)?, gid: number(&file.gid)?, mode: file.mode })
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
                held.secrets.insert(secret.id, secret.spec.data);
            }
            for bytes in &part.configs {
                let config: Config = encoding::decode(bytes)?;
                held.configs.insert(config.id, config.spec.data);
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
        Ok(part.last.then(|| std::mem::take(&mut self.0)))
    }
}
