//! What all stored objects share, and the list of their kinds.

use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};
use skep_api_derive::Extensible;

use crate::attachment::NetworkAttachment;
use crate::cluster::Cluster;
use crate::config::Config;
use crate::id::{AttachmentId, ClusterId, ConfigId, NetworkId, NodeId, SecretId, ServiceId, TaskId, VolumeId};
use crate::network::Network;
use crate::node::Node;
use crate::secret::Secret;
use crate::service::Service;
use crate::task::Task;
use crate::timestamp::Timestamp;
use crate::volume::Volume;

/// Kept by the store alone: whoever writes an object brings the version it read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Meta {
    /// The log index of the object's last change.
    #[serde(serialize_with = "as_index")]
    pub version: u64,
    /// The log index of the last change of what users declared of it.
    #[serde(skip)]
    pub spec_version: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn as_index<S: Serializer>(version: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Version {
        index: u64,
    }
    Version { index: *version }.serialize(serializer)
}

/// What the store asks of each kind of object.
pub trait Record: Clone + Send + Sync + 'static {
    type Id: Copy + Ord + Send + Sync + 'static;
    fn id(&self) -> Self::Id;
    fn meta(&self) -> &Meta;
    fn meta_mut(&mut self) -> &mut Meta;
    /// A name that no other object of the kind may have at the same time.
    fn unique_name(&self) -> Option<&str>;
}

macro_rules! objects {
    ($($kind:ident { id: $id:ty, name: |$object:ident| $name:expr }),* $(,)?) => {
        /// Any stored object.
        #[derive(Clone, Debug, PartialEq, Extensible)]
        pub enum Object { $($kind(Arc<$kind>)),* }

        /// Names any stored object.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Extensible, Serialize, Deserialize)]
        pub enum ObjectKey { $($kind($id)),* }

        impl Object {
            #[must_use]
            pub fn key(&self) -> ObjectKey {
                match self { $(Self::$kind(object) => ObjectKey::$kind(object.id)),* }
            }
        }

        impl ObjectKey {
            /// The kind's name, for messages.
            #[must_use]
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$kind(_) => stringify!($kind)),* }
            }
        }

        impl std::fmt::Display for ObjectKey {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self { $(Self::$kind(id) => write!(f, "{} {id}", stringify!($kind).to_lowercase())),* }
            }
        }

        $(
            impl Record for $kind {
                type Id = $id;
                fn id(&self) -> $id { self.id }
                fn meta(&self) -> &Meta { &self.meta }
                fn meta_mut(&mut self) -> &mut Meta { &mut self.meta }
                fn unique_name(&self) -> Option<&str> { let $object = self; $name }
            }
            impl From<$kind> for Object {
                fn from(object: $kind) -> Self { Self::$kind(Arc::new(object)) }
            }
        )*
    };
}

objects! {
    Cluster { id: ClusterId, name: |_cluster| None },
    Node { id: NodeId, name: |_node| None },
    Service { id: ServiceId, name: |service| (!service.removed).then_some(service.spec.name.as_str()) },
    Task { id: TaskId, name: |_task| None },
    Secret { id: SecretId, name: |secret| Some(&secret.spec.name) },
    Config { id: ConfigId, name: |config| Some(&config.spec.name) },
    Network { id: NetworkId, name: |network| Some(&network.spec.name) },
    NetworkAttachment { id: AttachmentId, name: |_attachment| None },
    Volume { id: VolumeId, name: |volume| Some(&volume.spec.name) },
}
