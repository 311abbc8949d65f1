"""Using what was trained: a document's evicted cache that is asked, grown, merged, saved and loaded."""
