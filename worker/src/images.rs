//! Images for tasks: those who want the same one at the same time get it by one pull.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures::FutureExt as _;
use futures::future::{Shared, WeakShared};
use skep_api::{SecretBytes, with_causes};
use skep_engine::{Credentials, Engine, ImageConfig, Platform};
use tokio::sync::mpsc;

/// A pull as its tasks wait for it. It is given up when none of them waits any more.
type Pull = Pin<Box<dyn Future<Output = Result<Arc<ImageConfig>, String>> + Send>>;

/// The images that tasks wait for; shared with the runners.
#[derive(Clone, Default)]
pub(crate) struct Images(Arc<Mutex<Vec<UnderWay>>>);

struct UnderWay {
    name: String,
    /// Only who may have the image gets it.
    registry_auth: SecretBytes,
    pull: WeakShared<Pull>,
}

impl Images {
    /// The image, pulled unless it is here for this host.
    pub(crate) async fn get(
        &self,
        engine: &Arc<Engine>,
        name: &str,
        registry_auth: &SecretBytes,
    ) -> Result<Arc<ImageConfig>, String> {
        if let Ok(image) = engine.image_for(name, Some(&Platform::own())) {
            return Ok(Arc::new(image.config));
        }
        self.join(engine, name, registry_auth).await
    }

    fn join(&self, engine: &Arc<Engine>, name: &str, registry_auth: &SecretBytes) -> Shared<Pull> {
        let mut pulls = self.0.lock().expect("nobody panics while holding it");
        pulls.retain(|under_way| under_way.pull.upgrade().is_some());
        let same = pulls.iter().find(|other| other.name == name && other.registry_auth == *registry_auth);
        if let Some(pull) = same.and_then(|under_way| under_way.pull.upgrade()) {
            return pull;
        }
        let pull: Pull = Box::pin(pull(engine.clone(), name.to_owned(), registry_auth.clone()));
        let pull = pull.shared();
        if let Some(weak) = pull.downgrade() {
            pulls.push(UnderWay { name: name.to_owned(), registry_auth: registry_auth.clone(), pull: weak });
        }
        pull
    }
}

async fn pull(engine: Arc<Engine>, name: String, registry_auth: SecretBytes) -> Result<Arc<ImageConfig>, String> {
    let credentials = Credentials::from_header(registry_auth.expose()).map_err(|error| error.to_string())?;
    // Nobody watches this progress: what does not fit is dropped.
    let (progress, _) = mpsc::channel(1);
    let image = engine.pull(&name, None, &credentials, &progress).await;
    image.map(|image| Arc::new(image.config)).map_err(|error| with_causes(&error))
}
