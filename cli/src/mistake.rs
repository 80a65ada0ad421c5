//! What the user got wrong, and the command ends with 2 for.

use phase_moe::Error;

/// A mistake of the user that only the command line can see.
#[derive(Debug)]
pub struct UserMistake(pub String);

impl std::fmt::Display for UserMistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UserMistake {}

/// True when the input is at fault, not the machine.
pub fn is_user_mistake(error: &anyhow::Error) -> bool {
    error.downcast_ref::<UserMistake>().is_some() || error.downcast_ref::<Error>().is_some_and(Error::is_user_error)
}
