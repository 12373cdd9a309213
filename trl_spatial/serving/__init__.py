"""An HTTP endpoint that scores images. The extra `serve`; nothing else imports it but the command."""
