"""Every server and worker as local processes under supervisord."""
