//! Who is who in a swarm: the root CA, join tokens, node certificates, and the TLS configurations
//! made from them; and TLS with servers that nobody vouches for, for all who need that.
//!
//! A certificate's subject is what the CA says, never what its request asks for: CN is the node's
//! id, OU its role, O the swarm's id. A configuration follows renewal without a restart. This crate
//! opens no connection and reads no clock: callers bring the time.

mod any_server;
pub mod ca;
pub mod identity;
pub mod lock;
pub mod peer;
pub mod tls;
pub mod token;

pub use any_server::AnyServer;
pub use ca::{CaDigest, CaError, IssuerInfo, RootAuthority, Subject};
pub use identity::{IdentityError, NodeIdentity, PendingIdentity};
pub use lock::{KeyLock, LockError, UnlockKey};
pub use peer::{PeerIdentity, PeerIdentityError};
pub use tls::{TlsError, TlsIdentity, pinned_client_config};
pub use token::{JoinToken, JoinTokenError};
