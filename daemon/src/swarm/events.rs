//! What happens in the swarm, as its managers see it; remembered for whoever asks later.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use skep_api::{Object, ServiceMode, Timestamp, VolumeSpec};
use skep_raft_store::{Change, Commit};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

/// As many as of the host's own.
const EVENTS_KEPT: usize = 1024;

/// Something happened to an object of the swarm.
#[derive(Clone, Debug)]
pub(crate) struct SwarmEvent {
    pub(crate) kind: &'static str,
    pub(crate) action: &'static str,
    pub(crate) id: String,
    /// Its name, and what changed of it: `replicas.old`, `replicas.new` and so on.
    pub(crate) attributes: BTreeMap<String, String>,
    pub(crate) at: Timestamp,
}

impl SwarmEvent {
    /// What a commit comes to.
    pub(crate) fn of(commit: &Commit) -> Vec<Self> {
        commit.changes.iter().filter_map(|change| event(change, commit.at)).collect()
    }
}

fn event(change: &Change, at: Timestamp) -> Option<SwarmEvent> {
    let gone = |object: &Object| matches!(object, Object::Service(service) if service.removed);
    let action = match (&change.before, &change.after) {
        (None, Some(_)) => "create",
        (Some(before), Some(after)) if gone(after) && !gone(before) => "remove",
        (Some(before), _) if gone(before) => return None,
        (Some(_), Some(_)) => "update",
        (Some(_), None) => "remove",
        (None, None) => return None,
    };
    let object = change.after.as_ref().or(change.before.as_ref())?;
    let (kind, id, name) = match object {
        Object::Service(service) => ("service", service.id.to_string(), service.spec.name.clone()),
        Object::Node(node) => ("node", node.id.to_string(), node.description.hostname.clone()),
        Object::Secret(secret) => ("secret", secret.id.to_string(), secret.spec.name.clone()),
        Object::Config(config) => ("config", config.id.to_string(), config.spec.name.clone()),
        Object::Network(network) => {
            // Its hints change; the network does not.
            if action == "update" {
                return None;
            }
            ("network", network.id.to_string(), network.spec.name.clone())
        }
        Object::Volume(volume) => {
            // As of networks: what its storage driver does is no change of it.
            if action == "update" && volume_spec(change.before.as_ref()) == volume_spec(change.after.as_ref()) {
                return None;
            }
            ("volume", volume.id.to_string(), volume.spec.name.clone())
        }
        Object::Cluster(_) | Object::Task(_) | Object::NetworkAttachment(_) => return None,
    };
    let mut attributes = BTreeMap::from([("name".to_owned(), name)]);
    if let (Some(before), Some(after), "update") = (&change.before, &change.after, action) {
        attributes.extend(differences(before, after));
    }
    Some(SwarmEvent { kind, action, id, attributes, at })
}

fn volume_spec(object: Option<&Object>) -> Option<&VolumeSpec> {
    match object {
        Some(Object::Volume(volume)) => Some(&volume.spec),
        _ => None,
    }
}

/// What an update changed, of what clients wait for.
fn differences(before: &Object, after: &Object) -> BTreeMap<String, String> {
    let (before, after) = (told(before), told(after));
    let mut attributes = BTreeMap::new();
    for (what, new) in after {
        let old = before.iter().find(|(other, _)| *other == what).map(|(_, old)| old);
        if old != Some(&new) {
            attributes.extend(old.map(|old| (format!("{what}.old"), old.clone())));
            attributes.insert(format!("{what}.new"), new);
        }
    }
    attributes
}

/// What is told of an object when it changes.
fn told(object: &Object) -> Vec<(&'static str, String)> {
    match object {
        Object::Service(service) => {
            let mut told = vec![("image", service.spec.task_template.container.image.clone())];
            if let ServiceMode::Replicated { replicas } = service.spec.mode {
                told.push(("replicas", replicas.to_string()));
            }
            told.extend(service.update_status.as_ref().map(|update| ("updatestate", update.state.as_str().to_owned())));
            told
        }
        Object::Node(node) => vec![
            ("availability", node.spec.availability.as_str().to_owned()),
            ("role", node.spec.role.as_str().to_owned()),
            ("state", node.status.state.as_str().to_owned()),
        ],
        _ => Vec::new(),
    }
}

/// The last of what has happened.
#[derive(Clone, Default)]
pub(crate) struct EventLog(Arc<Mutex<VecDeque<SwarmEvent>>>);

impl EventLog {
    /// Notes what a manager's store tells until that closes.
    pub(super) async fn follow(self, mut commits: Receiver<Arc<Commit>>) {
        loop {
            match commits.recv().await {
                Ok(commit) => self.note(SwarmEvent::of(&commit)),
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn note(&self, events: Vec<SwarmEvent>) {
        let mut past = self.0.lock().expect("nobody panics while holding it");
        past.extend(events);
        let too_many = past.len().saturating_sub(EVENTS_KEPT);
        past.drain(..too_many);
    }

    /// What has happened since a time, as far as it is remembered.
    pub(crate) fn since(&self, at: Timestamp) -> Vec<SwarmEvent> {
        let past = self.0.lock().expect("nobody panics while holding it");
        past.iter().filter(|event| event.at >= at).cloned().collect()
    }
}
