"""From a dense checkpoint on disk to a mixture on disk: file to file, tensor by tensor."""
