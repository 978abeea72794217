//! The state that the managers share, as persistent maps: taking a copy is free, and a copy never
//! changes, so a snapshot or a slow reader stalls nobody.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use skep_api::object::Record;
use skep_api::{
    Cluster, Config, Network, NetworkAttachment, Node, NodeId, Object, ObjectKey, Secret, Service, ServiceId, Task,
    TaskId, Volume,
};

use crate::transaction::{ACTIONS_MAX, Action, Change, Refusal, Transaction};

/// All objects of one kind, by id and by name.
#[derive(Clone, Debug)]
pub struct Table<T: Record> {
    rows: OrdMap<T::Id, Arc<T>>,
    names: OrdMap<String, T::Id>,
}

impl<T: Record> Default for Table<T> {
    fn default() -> Self {
        Self { rows: OrdMap::new(), names: OrdMap::new() }
    }
}

impl<T: Record> Table<T> {
    #[must_use]
    pub fn get(&self, id: T::Id) -> Option<&Arc<T>> {
        self.rows.get(&id)
    }

    /// The object of that name, whatever the case of its letters.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&Arc<T>> {
        self.names.get(&name.to_lowercase()).and_then(|&id| self.get(id))
    }

    /// In the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<T>> {
        self.rows.values()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn put(&mut self, object: Arc<T>) {
        if let Some(old) = self.rows.get(&object.id())
            && let Some(name) = old.unique_name()
        {
            self.names.remove(&name.to_lowercase());
        }
        if let Some(name) = object.unique_name() {
            self.names.insert(name.to_lowercase(), object.id());
        }
        self.rows.insert(object.id(), object);
    }

    fn take(&mut self, id: T::Id) -> Option<Arc<T>> {
        let object = self.rows.remove(&id)?;
        if let Some(name) = object.unique_name() {
            self.names.remove(&name.to_lowercase());
        }
        Some(object)
    }
}

/// Everything the managers agree on, at one index of the log.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// The last log entry that is in here.
    pub index: u64,
    pub clusters: Table<Cluster>,
    pub nodes: Table<Node>,
    pub services: Table<Service>,
    pub tasks: Table<Task>,
    pub secrets: Table<Secret>,
    pub configs: Table<Config>,
    pub networks: Table<Network>,
    pub attachments: Table<NetworkAttachment>,
    pub volumes: Table<Volume>,
    tasks_by_service: OrdSet<(ServiceId, TaskId)>,
    tasks_by_node: OrdSet<(NodeId, TaskId)>,
}

/// Runs an expression for the table of whatever kind a key or object has.
macro_rules! by_kind {
    ($tables:expr, $value:expr, $enum:ident, |$table:ident, $inner:ident| $body:expr) => {
        match $value {
            $enum::Cluster($inner) => {
                let $table = &$tables.clusters;
                $body.map(Object::Cluster)
            }
            $enum::Node($inner) => {
                let $table = &$tables.nodes;
                $body.map(Object::Node)
            }
            $enum::Service($inner) => {
                let $table = &$tables.services;
                $body.map(Object::Service)
            }
            $enum::Task($inner) => {
                let $table = &$tables.tasks;
                $body.map(Object::Task)
            }
            $enum::Secret($inner) => {
                let $table = &$tables.secrets;
                $body.map(Object::Secret)
            }
            $enum::Config($inner) => {
                let $table = &$tables.configs;
                $body.map(Object::Config)
            }
            $enum::Network($inner) => {
                let $table = &$tables.networks;
                $body.map(Object::Network)
            }
            $enum::NetworkAttachment($inner) => {
                let $table = &$tables.attachments;
                $body.map(Object::NetworkAttachment)
            }
            $enum::Volume($inner) => {
                let $table = &$tables.volumes;
                $body.map(Object::Volume)
            }
        }
    };
}

impl Tables {
    /// The swarm; absent only before its first entry is applied.
    #[must_use]
    pub fn cluster(&self) -> Option<&Arc<Cluster>> {
        self.clusters.iter().next()
    }

    #[must_use]
    pub fn get(&self, key: ObjectKey) -> Option<Object> {
        by_kind!(self, key, ObjectKey, |table, id| table.get(id).cloned())
    }

    /// A service's tasks, in the order of their ids.
    pub fn tasks_of_service(&self, service: ServiceId) -> impl Iterator<Item = &Arc<Task>> {
        let (first, last) = (TaskId::from_u128(0), TaskId::from_u128(u128::MAX));
        self.tasks_by_service.range((service, first)..=(service, last)).filter_map(|&(_, task)| self.tasks.get(task))
    }

    /// The tasks bound to a node, in the order of their ids.
    pub fn tasks_of_node(&self, node: NodeId) -> impl Iterator<Item = &Arc<Task>> {
        let (first, last) = (TaskId::from_u128(0), TaskId::from_u128(u128::MAX));
        self.tasks_by_node.range((node, first)..=(node, last)).filter_map(|&(_, task)| self.tasks.get(task))
    }

    /// Applies a transaction that the log holds at `index`; on refusal nothing has changed.
    ///
    /// Invariant: the outcome depends on `self`, `index` and `transaction` alone.
    pub(crate) fn apply(&mut self, index: u64, transaction: Transaction) -> Result<Vec<Change>, Refusal> {
        if transaction.actions.len() > ACTIONS_MAX {
            self.index = index;
            return Err(Refusal::TooLarge(transaction.actions.len()));
        }
        let mut next = self.clone();
        next.index = index;
        let changes: Result<Vec<_>, _> =
            transaction.actions.into_iter().map(|action| next.act(index, transaction.at, action)).collect();
        match changes {
            Ok(changes) => {
                *self = next;
                Ok(changes)
            }
            Err(refusal) => {
                self.index = index;
                Err(refusal)
            }
        }
    }

    /// Applies a transaction as the log would: for tests of what decides over [`Tables`].
    #[doc(hidden)]
    pub fn apply_for_test(&mut self, index: u64, transaction: Transaction) -> Result<(), Refusal> {
        self.apply(index, transaction).map(drop)
    }

    fn act(&mut self, index: u64, at: skep_api::Timestamp, action: Action) -> Result<Change, Refusal> {
        match action {
            Action::Create(object) => {
                let key = object.key();
                if self.get(key).is_some() {
                    return Err(Refusal::Exists(key));
                }
                let object = stamp(object, |meta| {
                    *meta = skep_api::Meta { version: index, spec_version: index, created_at: at, updated_at: at };
                });
                self.put(object.clone())?;
                Ok(Change { key, before: None, after: Some(object) })
            }
            Action::Update(object) => {
                let key = object.key();
                let before = self.get(key).ok_or(Refusal::Missing(key))?;
                check_version(key, meta(&object).version, &before)?;
                let skep_api::Meta { created_at, spec_version, .. } = meta(&before);
                let spec_version = if is_declared_alike(&before, &object) { spec_version } else { index };
                let object = stamp(object, |meta| {
                    *meta = skep_api::Meta { version: index, spec_version, created_at, updated_at: at };
                });
                self.put(object.clone())?;
                Ok(Change { key, before: Some(before), after: Some(object) })
            }
            Action::Delete(key, version) => {
                let before = self.get(key).ok_or(Refusal::Missing(key))?;
                check_version(key, version, &before)?;
                self.take(key);
                Ok(Change { key, before: Some(before), after: None })
            }
        }
    }

    /// Puts an object back as it was: from a snapshot.
    pub(crate) fn restore(&mut self, object: Object) -> Result<(), Refusal> {
        self.put(object)
    }

    fn put(&mut self, object: Object) -> Result<(), Refusal> {
        match object {
            Object::Cluster(cluster) => self.clusters.put(cluster),
            Object::Node(node) => self.nodes.put(node),
            Object::Service(service) => {
                check_name(&self.services, &service, ObjectKey::Service)?;
                self.services.put(service);
            }
            Object::Task(task) => self.put_task(task),
            Object::Secret(secret) => {
                check_name(&self.secrets, &secret, ObjectKey::Secret)?;
                self.secrets.put(secret);
            }
            Object::Config(config) => {
                check_name(&self.configs, &config, ObjectKey::Config)?;
                self.configs.put(config);
            }
            Object::Network(network) => {
                check_name(&self.networks, &network, ObjectKey::Network)?;
                self.networks.put(network);
            }
            Object::NetworkAttachment(attachment) => self.attachments.put(attachment),
            Object::Volume(volume) => {
                check_name(&self.volumes, &volume, ObjectKey::Volume)?;
                self.volumes.put(volume);
            }
        }
        Ok(())
    }

    /// Tasks made from the same spec share it in memory: a task of many costs little.
    fn put_task(&mut self, mut task: Arc<Task>) {
        let old = self.tasks.get(task.id).cloned();
        let shared = old.as_ref().map(|old| &old.spec).into_iter().chain(
            self.services.get(task.service_id).into_iter().flat_map(|service| {
                let previous = service.previous_spec.as_ref().map(|spec| &spec.task_template);
                std::iter::once(&service.spec.task_template).chain(previous)
            }),
        );
        if let Some(spec) = shared.into_iter().find(|spec| **spec == task.spec).cloned() {
            Arc::make_mut(&mut task).spec = spec;
        }
        self.tasks_by_service.insert((task.service_id, task.id));
        if let Some(node) = old.and_then(|old| old.node_id) {
            self.tasks_by_node.remove(&(node, task.id));
        }
        if let Some(node) = task.node_id {
            self.tasks_by_node.insert((node, task.id));
        }
        self.tasks.put(task);
    }

    fn take(&mut self, key: ObjectKey) {
        match key {
            ObjectKey::Cluster(id) => drop(self.clusters.take(id)),
            ObjectKey::Node(id) => drop(self.nodes.take(id)),
            ObjectKey::Service(id) => drop(self.services.take(id)),
            ObjectKey::Secret(id) => drop(self.secrets.take(id)),
            ObjectKey::Config(id) => drop(self.configs.take(id)),
            ObjectKey::Network(id) => drop(self.networks.take(id)),
            ObjectKey::NetworkAttachment(id) => drop(self.attachments.take(id)),
            ObjectKey::Volume(id) => drop(self.volumes.take(id)),
            ObjectKey::Task(id) => {
                if let Some(task) = self.tasks.take(id) {
                    self.tasks_by_service.remove(&(task.service_id, id));
                    if let Some(node) = task.node_id {
                        self.tasks_by_node.remove(&(node, id));
                    }
                }
            }
        }
    }

    /// Every object, services before their tasks so that specs are shared again when read back.
    pub(crate) fn objects(&self) -> impl Iterator<Item = Object> + '_ {
        self.clusters
            .iter()
            .cloned()
            .map(Object::Cluster)
            .chain(self.nodes.iter().cloned().map(Object::Node))
            .chain(self.services.iter().cloned().map(Object::Service))
            .chain(self.tasks.iter().cloned().map(Object::Task))
            .chain(self.secrets.iter().cloned().map(Object::Secret))
            .chain(self.configs.iter().cloned().map(Object::Config))
            .chain(self.networks.iter().cloned().map(Object::Network))
            .chain(self.attachments.iter().cloned().map(Object::NetworkAttachment))
            .chain(self.volumes.iter().cloned().map(Object::Volume))
    }
}

fn check_version(key: ObjectKey, expected: u64, before: &Object) -> Result<(), Refusal> {
    let found = meta(before).version;
    if expected == found { Ok(()) } else { Err(Refusal::Stale { key, expected, found }) }
}

/// Whether two states of an object that changes by itself, too, have the same spec.
fn is_declared_alike(before: &Object, after: &Object) -> bool {
    match (before, after) {
        (Object::Cluster(before), Object::Cluster(after)) => before.spec == after.spec,
        (Object::Node(before), Object::Node(after)) => before.spec == after.spec,
        (Object::Service(before), Object::Service(after)) => before.spec == after.spec,
        (Object::Volume(before), Object::Volume(after)) => before.spec == after.spec,
        _ => false,
    }
}

fn check_name<T: Record>(table: &Table<T>, object: &T, key: fn(T::Id) -> ObjectKey) -> Result<(), Refusal> {
    let Some(name) = object.unique_name() else { return Ok(()) };
    match table.by_name(name) {
        Some(other) if other.id() != object.id() => {
            Err(Refusal::NameTaken { name: name.to_owned(), key: key(other.id()) })
        }
        _ => Ok(()),
    }
}

fn meta(object: &Object) -> skep_api::Meta {
    match object {
        Object::Cluster(object) => object.meta,
        Object::Node(object) => object.meta,
        Object::Service(object) => object.meta,
        Object::Task(object) => object.meta,
        Object::Secret(object) => object.meta,
        Object::Config(object) => object.meta,
        Object::Network(object) => object.meta,
        Object::NetworkAttachment(object) => object.meta,
        Object::Volume(object) => object.meta,
    }
}

fn stamp(mut object: Object, set: impl FnOnce(&mut skep_api::Meta)) -> Object {
    match &mut object {
        Object::Cluster(object) => set(Arc::make_mut(object).meta_mut()),
        Object::Node(object) => set(Arc::make_mut(object).meta_mut()),
        Object::Service(object) => set(Arc::make_mut(object).meta_mut()),
        Object::Task(object) => set(Arc::make_mut(object).meta_mut()),
        Object::Secret(object) => set(Arc::make_mut(object).meta_mut()),
        Object::Config(object) => set(Arc::make_mut(object).meta_mut()),
        Object::Network(object) => set(Arc::make_mut(object).meta_mut()),
        Object::NetworkAttachment(object) => set(Arc::make_mut(object).meta_mut()),
        Object::Volume(object) => set(Arc::make_mut(object).meta_mut()),
    }
    object
}

#[cfg(test)]
mod tests {
    use skep_api::node::NodeStatus;
    use skep_api::{Node, NodeDescription, NodeId, NodeSpec, SecretId, SecretSpec, Timestamp};

    use super::*;

    fn secret(id: u128, name: &str) -> Secret {
        Secret {
            id: SecretId::from_u128(id),
            meta: skep_api::Meta::default(),
            spec: SecretSpec { name: name.into(), ..SecretSpec::default() },
        }
    }

    fn apply(tables: &mut Tables, action: Action) -> Result<Vec<Change>, Refusal> {
        let index = tables.index + 1;
        tables.apply(index, Transaction { at: Timestamp::from_nanos(7), actions: vec![action] })
    }

    #[test]
    fn an_update_with_a_stale_version_is_refused() {
        let mut tables = Tables::default();
        apply(&mut tables, Action::Create(secret(1, "a").into())).unwrap();
        let read = tables.secrets.by_name("A").unwrap().as_ref().clone();
        apply(&mut tables, Action::Update(read.clone().into())).unwrap();
        let refusal = apply(&mut tables, Action::Update(read.into())).unwrap_err();
        assert!(matches!(refusal, Refusal::Stale { expected: 1, found: 2, .. }), "{refusal}");
        assert_eq!(tables.index, 3, "a refused entry is applied all the same");
    }

    #[test]
    fn what_was_declared_has_a_version_of_its_own() {
        let mut tables = Tables::default();
        let id = NodeId::from_u128(1);
        let node = Node {
            id,
            meta: skep_api::Meta::default(),
            spec: NodeSpec::default(),
            description: NodeDescription::default(),
            status: NodeStatus::default(),
            raft: None,
            bulk_port: 0,
        };
        apply(&mut tables, Action::Create(node.into())).unwrap();
        let mut change = |change: fn(&mut Node)| {
            let mut node = (**tables.nodes.get(id).unwrap()).clone();
            change(&mut node);
            apply(&mut tables, Action::Update(node.into())).unwrap();
            let meta = tables.nodes.get(id).unwrap().meta;
            (meta.spec_version, meta.version)
        };
        assert_eq!(change(|node| node.bulk_port = 7), (1, 2));
        assert_eq!(change(|node| drop(node.spec.labels.insert("a".into(), "b".into()))), (3, 3));
        assert_eq!(change(|node| node.bulk_port = 8), (3, 4));
    }

    #[test]
    fn a_name_is_taken_until_its_owner_is_gone() {
        let mut tables = Tables::default();
        apply(&mut tables, Action::Create(secret(1, "a").into())).unwrap();
        assert!(matches!(apply(&mut tables, Action::Create(secret(2, "A").into())), Err(Refusal::NameTaken { .. })));
        apply(&mut tables, Action::Delete(ObjectKey::Secret(SecretId::from_u128(1)), 1)).unwrap();
        apply(&mut tables, Action::Create(secret(2, "A").into())).unwrap();
    }

    #[test]
    fn a_transaction_is_whole_or_nothing_and_views_do_not_move() {
        let mut tables = Tables::default();
        let view = tables.clone();
        let mut transaction = Transaction::new(Timestamp::NEVER);
        transaction.create(secret(1, "a"));
        transaction.create(secret(2, "a"));
        assert!(tables.apply(1, transaction).is_err());
        assert!(tables.secrets.is_empty());
        apply(&mut tables, Action::Create(secret(1, "a").into())).unwrap();
        assert_eq!((tables.secrets.len(), view.secrets.len()), (1, 0));
    }
}
