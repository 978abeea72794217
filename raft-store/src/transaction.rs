//! Writes: all of a transaction happens, or nothing of it.

use serde::{Deserialize, Serialize};
use skep_api::{Extensible, Object, ObjectKey, Timestamp};

/// Objects to create, change and delete together.
#[derive(Clone, Debug, Default, PartialEq, Extensible)]
pub struct Transaction {
    /// The author's clock; it becomes the objects' times on every manager.
    pub at: Timestamp,
    pub actions: Vec<Action>,
}

/// The most actions in one transaction.
pub const ACTIONS_MAX: usize = 10_000;

#[derive(Clone, Debug, PartialEq, Extensible)]
pub enum Action {
    Create(Object),
    /// Goes through only if the object still has the version it carries.
    Update(Object),
    /// Goes through only if the object still has this version.
    Delete(ObjectKey, u64),
}

impl Transaction {
    #[must_use]
    pub fn new(at: Timestamp) -> Self {
        Self { at, actions: Vec::new() }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.actions.is_empty()
    }

    pub fn create(&mut self, object: impl Into<Object>) {
        self.actions.push(Action::Create(object.into()));
    }

    pub fn update(&mut self, object: impl Into<Object>) {
        self.actions.push(Action::Update(object.into()));
    }

    pub fn delete(&mut self, key: ObjectKey, version: u64) {
        self.actions.push(Action::Delete(key, version));
    }
}

/// Why a transaction changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    #[error("{key} was changed meanwhile: it has version {found}, not {expected}; read it again and repeat")]
    Stale { key: ObjectKey, expected: u64, found: u64 },
    #[error("{0} does not exist")]
    Missing(ObjectKey),
    #[error("{0} exists already")]
    Exists(ObjectKey),
    #[error("the name {name:?} is taken by {key}")]
    NameTaken { name: String, key: ObjectKey },
    #[error("a transaction of {0} actions is too large: at most {ACTIONS_MAX} are allowed")]
    TooLarge(usize),
    #[error("the transaction cannot be read: {0}")]
    Unreadable(String),
}

/// One object's change, with what it was before.
#[derive(Clone, Debug)]
pub struct Change {
    pub key: ObjectKey,
    pub before: Option<Object>,
    pub after: Option<Object>,
}

/// What one transaction changed, told to watchers once it is applied.
#[derive(Clone, Debug)]
pub struct Commit {
    pub index: u64,
    pub at: Timestamp,
    pub changes: Vec<Change>,
}
